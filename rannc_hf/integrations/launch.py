"""`accelerate launch` with a `rannc_config:` section, and `rannc launch`, which needs no hook in accelerate.

Both read the options in the launcher, so that a mistake in them is found before any process is started, hand them to
the workers in RANNC_CONFIG, and have the workers start `rannc_hf/run.py script ...` in place of `script ...`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rannc_hf.config import ENVIRONMENT_VARIABLE, SECTION, RanncConfig
from rannc_hf.integrations.refusals import refuse, unsupported_settings

_RUN = str(Path(__file__).resolve().parent.parent / "run.py")


def main(argv: Sequence[str] | None = None) -> None:
    """`rannc launch [options of accelerate launch] [--rannc OPTIONS] script.py [argument ...]`.

    OPTIONS is whatever `RanncConfig.load` takes: "auto", a path or JSON. It may also come from a `rannc_config:`
    section of accelerate's config file or from RANNC_CONFIG; without any of them everything is planned automatically.

    Raises ValueError for options or settings that RaNNC cannot train with, before any process is started.
    """
    from accelerate.commands import launch as accelerate_launch

    parser = accelerate_launch.launch_command_parser()
    parser.prog, parser.usage = "rannc launch", "rannc launch [options] [--rannc OPTIONS] script.py [argument ...]"
    # accelerate's help leaves out options of groups it does not know.
    parser.description = 'OPTIONS: "auto", a YAML or JSON file, or JSON. The other options are accelerate launch\'s.'
    parser.add_argument("--rannc", metavar="OPTIONS")
    args = parser.parse_args(argv)
    options = args.rannc
    del args.rannc
    # Where the hook is installed it has wrapped `launch_command`, and would come here a second time.
    launch(args, inspect.unwrap(accelerate_launch.launch_command), options, always=True)


def launch(
    args: argparse.Namespace,
    start: Callable[[argparse.Namespace], None],
    options: str | None = None,
    *,
    always: bool = False,
) -> None:
    """Start the workers of a training, under RaNNC where it is asked for or `always`.

    args: the parsed command line of accelerate's launcher, changed in place.
    start: accelerate's `launch_command`.

    Raises ValueError for options or settings that RaNNC cannot train with.
    """
    from accelerate.utils import patch_environment

    with _our_section_taken_out() as section:
        defaults = _accelerate_config(args)
        config = _choose(options, section)
        if config is None and not always:
            return start(args)
        _refuse_unsupported(args, defaults)
        environ = {ENVIRONMENT_VARIABLE: json.dumps((config or RanncConfig()).to_dict())}
        if args.cpu or getattr(defaults, "use_cpu", False):
            # accelerate starts the processes, but would let each train on its own.
            environ["ACCELERATE_USE_CPU"] = "true"
        if args.cpu and _processes(args, defaults) > 1:
            # accelerate would start one.
            args.cpu, args.multi_gpu, args.use_cpu = False, True, True
        _redirect(args)
        with patch_environment(**environ):
            return start(args)


@contextmanager
def _our_section_taken_out() -> Iterator[dict[str, Any]]:
    """While active, accelerate reads config files as if they had no section of ours; yields what the section held."""
    from accelerate.commands.config.config_args import BaseConfig

    section: dict[str, Any] = {}
    stock = BaseConfig.process_config

    def process_config(config_dict: dict[str, Any]) -> dict[str, Any]:
        if SECTION in config_dict:
            section[SECTION] = config_dict.pop(SECTION)
        return stock(config_dict)

    BaseConfig.process_config = staticmethod(process_config)
    try:
        yield section
    finally:
        BaseConfig.process_config = staticmethod(stock)


def _accelerate_config(args: argparse.Namespace) -> Any:
    """The config file for this launch as accelerate reads it, or None where there is none."""
    from accelerate.commands.config import default_config_file, load_config_from_file

    if args.config_file is None and not os.path.isfile(default_config_file):
        return None
    return load_config_from_file(args.config_file)


def _choose(options: str | None, section: dict[str, Any]) -> RanncConfig | None:
    """The options from the one place that has them, or None."""
    environment = os.environ.get(ENVIRONMENT_VARIABLE) or None
    given = {"--rannc": options, ENVIRONMENT_VARIABLE: environment, f"a `{SECTION}:` section": section or None}
    sources = {name: source for name, source in given.items() if source is not None}
    if len(sources) > 1:
        raise ValueError(f"rannc config: options come from {' and from '.join(sources)}; keep one of them")
    return next((RanncConfig.load(source) for source in sources.values()), None)


def _refuse_unsupported(args: argparse.Namespace, defaults: Any) -> None:
    kind = defaults.distributed_type.value if defaults is not None else "NO"
    flags = {"DEEPSPEED": args.use_deepspeed, "FSDP": args.use_fsdp, "MEGATRON_LM": args.use_megatron_lm}
    environ = {f"ACCELERATE_USE_{name}": "true" for name, flag in flags.items() if flag or name == kind}
    environ["ACCELERATE_MIXED_PRECISION"] = args.mixed_precision or getattr(defaults, "mixed_precision", None) or "no"
    dynamo = getattr(defaults, "dynamo_config", None) or {}
    environ["ACCELERATE_DYNAMO_BACKEND"] = args.dynamo_backend or dynamo.get("dynamo_backend") or "no"
    if args.use_parallelism_config or getattr(defaults, "parallelism_config", None):
        environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
    reasons = unsupported_settings({}, environ)
    if defaults is not None and defaults.compute_environment.value != "LOCAL_MACHINE":
        reasons.append(f"`compute_environment: {defaults.compute_environment}` is not supported; use LOCAL_MACHINE")
    elif args.tpu or kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED", "FSDP", "MEGATRON_LM"):
        reasons.append(f"{'TPU' if args.tpu else kind} is not supported; set `distributed_type: MULTI_GPU`")
    if args.no_python:
        reasons.append("`--no_python` leaves no place for RaNNC in the workers; give a script, or `--module`")
    alone = not args.multi_gpu and not args.cpu and not args.mpirun_hostfile
    if defaults is not None and kind in ("NO", "MULTI_CPU") and alone and _processes(args, defaults) > 1:
        reasons.append(
            f"`distributed_type: {kind}` starts a single process; set `distributed_type: MULTI_GPU`"
            + (" and `use_cpu: true`" if kind == "MULTI_CPU" else "")
        )
    refuse(reasons)


def _processes(args: argparse.Namespace, defaults: Any) -> int:
    return int(args.num_processes or getattr(defaults, "num_processes", None) or 1)


def _redirect(args: argparse.Namespace) -> None:
    if args.module and args.training_script == "rannc_hf.run":
        return
    script = ["-m", args.training_script] if args.module else [args.training_script]
    args.training_script_args = [*script, *args.training_script_args]
    args.training_script, args.module = _RUN, False
