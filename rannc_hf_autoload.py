"""Lets `accelerate launch` understand a config file with a `rannc_config:` section.

torch calls `autoload` at the end of every `import torch` (entry point group `torch.backends`), also in programs that
have nothing to do with us. So this file is small, needs the standard library only, imports neither accelerate nor
transformers, and never raises. All it does is to wait for two modules of accelerate:

- `accelerate.commands.launch`, which only a launcher imports: its `launch_command` goes through
  `rannc_hf.integrations.launch`, which reads our section and has the workers started by `rannc_hf/run.py`;
- `accelerate.accelerator`, in a worker (where RANNC_CONFIG is set): an Accelerator that is not ours must not train
  silently without the plan the user asked for, so making one is an error.
"""

from __future__ import annotations

import functools
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

_LAUNCHER = "accelerate.commands.launch"
_RUN_LAUNCHER = f"import sys\nfrom {_LAUNCHER} import main\nsys.exit(main())\n"


def autoload() -> None:
    """Start waiting. Called by torch."""
    try:
        if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport())
    except Exception as error:
        _complain(error)


class _AfterImport(MetaPathFinder):
    """Finds modules of accelerate as usual, and patches them once they have been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        in_worker = "RANNC_CONFIG" in os.environ
        if name != _LAUNCHER and not (in_worker and name.startswith("accelerate.")):
            return None
        try:
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                _extend(spec.loader, name)
            return spec
        except Exception as error:
            _complain(error)
            return None


def _extend(loader: Loader, name: str) -> None:
    execute = loader.exec_module

    def exec_module(module: Any) -> None:
        vars(loader).pop("get_code", None)
        execute(module)
        try:
            if name == _LAUNCHER:
                _redirect_launcher(module)
            else:
                _guard_accelerator()
        except Exception as error:
            _complain(error)

    loader.exec_module = exec_module  # type: ignore[method-assign]
    if name == _LAUNCHER:
        # `python -m accelerate.commands.launch` asks for the code and runs it under another name, unseen by the above:
        # hand out code that imports the module instead.
        loader.get_code = lambda _: compile(_RUN_LAUNCHER, f"<{_LAUNCHER}>", "exec")  # type: ignore[attr-defined]


def _redirect_launcher(launcher: Any) -> None:
    stock = launcher.launch_command

    @functools.wraps(stock)
    def launch_command(args: Any) -> None:
        try:
            from rannc_hf.integrations.launch import launch
        except Exception as error:
            # Plain launches still work; a config with our section is refused by accelerate as an unknown key.
            _complain(error)
            return stock(args)
        return launch(args, stock)

    launcher.launch_command = launch_command


def _guard_accelerator() -> None:
    # Where a script imports accelerate first, torch is imported from within accelerate.accelerator, too late to see
    # that module begin. It is complete by the time the next module of accelerate has been imported.
    cls = getattr(sys.modules.get("accelerate.accelerator"), "Accelerator", None)
    if cls is None or hasattr(cls.__init__, "rannc_guard"):
        return
    stock = cls.__init__

    @functools.wraps(stock)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not getattr(self, "is_rannc_accelerator", False) and "RANNC_CONFIG" in os.environ:
            raise RuntimeError(
                "RANNC_CONFIG is set, but this process makes a plain accelerate.Accelerator, which would train "
                "without RaNNC. Start the script with `accelerate launch --config_file <config with a rannc_config: "
                "section>`, `rannc launch` or `python -m rannc_hf.run`, or make a rannc_hf.RanncAccelerator instead; "
                "unset RANNC_CONFIG to train without RaNNC."
            )
        stock(self, *args, **kwargs)

    __init__.rannc_guard = True  # type: ignore[attr-defined]
    cls.__init__ = __init__


def _complain(error: Exception) -> None:
    sys.stderr.write(f"rannc_hf: the hook for `accelerate launch` is off, use `rannc launch` instead: {error!r}\n")
