"""`RanncConfig`: every option of rannc_hf, in one place.

It comes from keywords, a mapping, a YAML or JSON file, or the environment, always through `RanncConfig.load`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

ENVIRONMENT_VARIABLE = "RANNC_CONFIG"
SECTION = "rannc_config"
"""Key of an accelerate config file under which our options live."""

_ACCELERATE_KEYS = frozenset({"compute_environment", "distributed_type", "num_processes"})
_SCHEDULES = ("auto", "gpipe", "1f1b", "interleaved")
_RECOMPUTE = ("auto", "none", "blocks")
_LOSS = ("auto", "fused", "split")
_COSTS = ("auto", "measured", "analytic")
_SHARD = ("auto", "none", "optimizer", "gradients", "parameters")
DECIDED = ("stages", "replicas", "microbatches", "schedule", "recompute", "shard")
"""Options that a plan is an answer to."""
_PLANNING = (*DECIDED, "costs", "memory_limit_gib")
"""Options of the planner, which a given plan leaves nothing to decide for."""


@dataclass(kw_only=True, slots=True, frozen=True)
class RanncConfig:
    """Options of planning and training. The defaults plan everything automatically.

    Raises ValueError, naming the field, for a value of the wrong type or outside its range.
    """

    plan: str | None = None
    """Path of a plan (JSON) to train with. None: a plan is searched for when training starts."""

    stages: Literal["auto"] | int = "auto"
    """Number of pipeline stages; 1 is plain data parallel training. "auto": the planner chooses."""

    replicas: Literal["auto"] | tuple[int, ...] = "auto"
    """Ranks of each stage, e.g. [1, 3]. "auto": the planner chooses."""

    microbatches: Literal["auto"] | int = "auto"
    """Parts the global batch is cut into; 1 turns pipelining off. "auto": the planner chooses."""

    schedule: Literal["auto", "gpipe", "1f1b", "interleaved"] = "auto"
    """Order of forwards and backwards. "auto": the planner chooses.

    Under "interleaved" each rank runs several stages; `stages` and `replicas` are then groups of ranks and their sizes.
    """

    recompute: Literal["auto", "none", "blocks"] = "auto"
    """"blocks" keeps only the inputs of each block and computes it again in the backward; "none" keeps everything.

    "auto": the planner chooses per stage.
    """

    shard: Literal["auto", "none", "optimizer", "gradients", "parameters"] = "auto"
    """What the replicas of a stage divide among them; each of these includes those before it.

    "none": nothing, as under DDP; "optimizer": optimizer state and masters (ZeRO-1); "gradients" (ZeRO-2);
    "parameters" (ZeRO-3, fully sharded). "auto": the planner chooses per stage.
    """

    loss: Literal["auto", "fused", "split"] = "auto"
    """Where the loss of training is computed.

    "fused": by the model, as part of the pipeline, which returns it alone; "split": by the script, from outputs that
    the model returns (its own loss among them, if it has labels); all forwards then run before all backwards. "auto":
    fused where the model returns a loss for the batch.
    """

    costs: Literal["auto", "measured", "analytic"] = "auto"
    """Where the planner takes the times of blocks from.

    "measured": each unique block is run on the device in use, and remembered on disk; "analytic": FLOPs and bytes
    against what the device can do. "auto": measured on CUDA, analytic on a CPU.
    """

    memory_limit_gib: Literal["auto"] | float = "auto"
    """Memory that a plan may use on each device, in GiB. "auto": what the device has, less a margin."""

    compile: Literal["auto"] | bool = "auto"
    """Whether blocks are compiled by `torch.compile`, once for all that are equal. "auto": on GPUs with Triton."""

    log: str | None = None
    """Path of a file to which rank 0 appends a line of JSON a training step: loss, time, rates, memory. None: none."""

    progress: Literal["auto"] | bool = "auto"
    """Whether rank 0 prints such lines for people. "auto": on a terminal, while the script draws no progress bar."""

    plan_output: str | None = None
    """Path to which rank 0 writes the plan in use as JSON. None: it is not written."""

    timeout_s: float = 600.0
    """Seconds that any wait for another rank may take before it becomes an error.

    While rank 0 plans, and measures costs for that, the others wait as long as it lives.
    """

    pad: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Padding value by field of the batch, for fields whose lengths differ between ranks.

    They extend and override the built-in rules (input_ids, attention_mask, token_type_ids, labels).
    """

    length_multiple: int = 32
    """Lengths of padded batches are rounded up to a multiple of this, where it changes nothing; 1 turns that off."""

    deferred_init: bool = False
    """Whether the Transformers models that a script builds or loads get memory only where their parameters are owned.

    For models larger than a process's share of host memory. Values are the same; but until the first batch, nothing
    can be computed with such a model. It holds from when the script starts (or the Accelerator is made).
    """

    seed: int = 0
    """Seed of the random streams of dropout."""

    def __post_init__(self) -> None:
        for name in ("plan", "plan_output", "log"):
            value = getattr(self, name)
            if isinstance(value, Path):
                object.__setattr__(self, name, str(value))
            elif value is not None and not (isinstance(value, str) and value):
                _refuse(name, value, "a path or null")
        _check_int("stages", self.stages, minimum=1, auto=True)
        _check_int("microbatches", self.microbatches, minimum=1, auto=True)
        _check_int("length_multiple", self.length_multiple, minimum=1)
        _check_int("seed", self.seed, minimum=0)
        _check_choice("schedule", self.schedule, _SCHEDULES)
        _check_choice("recompute", self.recompute, _RECOMPUTE)
        _check_choice("shard", self.shard, _SHARD)
        _check_choice("loss", self.loss, _LOSS)
        if not isinstance(self.deferred_init, bool):
            _refuse("deferred_init", self.deferred_init, "true or false")
        for name in ("compile", "progress"):
            if (value := getattr(self, name)) != "auto" and not isinstance(value, bool):
                _refuse(name, value, 'true, false or "auto"')
        _check_choice("costs", self.costs, _COSTS)
        object.__setattr__(self, "timeout_s", _positive("timeout_s", self.timeout_s))
        if self.memory_limit_gib != "auto":
            object.__setattr__(
                self, "memory_limit_gib", _positive("memory_limit_gib", self.memory_limit_gib, auto=True)
            )
        object.__setattr__(self, "replicas", _replicas(self.replicas))
        object.__setattr__(self, "pad", _pad(self.pad))
        self._check_together()

    def _check_together(self) -> None:
        if self.stages != "auto" and self.replicas != "auto" and len(self.replicas) != self.stages:
            raise ValueError(
                f"rannc config: replicas={list(self.replicas)} is for {len(self.replicas)} stages, "
                f"but stages={self.stages}"
            )
        if self.plan is not None:
            clash = [name for name in _PLANNING if getattr(self, name) != "auto"]
            if clash:
                raise ValueError(
                    f"rannc config: plan={self.plan!r} already decides {', '.join(clash)}; "
                    f"leave {'it' if len(clash) == 1 else 'them'} out, or edit the plan"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `RanncConfig.load(config.to_dict()) == config`."""
        result = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.replicas != "auto":
            result["replicas"] = list(self.replicas)
        result["pad"] = dict(self.pad)
        return result

    @classmethod
    def load(cls, source: RanncConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None) -> RanncConfig:
        """Options from wherever the user keeps them.

        `source` is a RanncConfig, a mapping, "auto", a JSON string, or the path of a YAML or JSON file that holds the
        options themselves or an accelerate config with a `rannc_config:` section. None reads the environment variable
        RANNC_CONFIG in the same way and gives the defaults where it is not set.

        Raises ValueError for unknown keys, wrong values, and files that cannot be read.
        """
        if source is None:
            text = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
            return cls._from_text(text, f"environment variable {ENVIRONMENT_VARIABLE}") if text else cls()
        if isinstance(source, RanncConfig):
            return source
        if isinstance(source, Mapping):
            return cls._from_section(source, "options")
        if isinstance(source, (str, os.PathLike)):
            return cls._from_text(os.fspath(source), "options")
        raise ValueError(
            f"rannc config: cannot read options from {type(source).__name__}; "
            'give "auto", a mapping, a JSON string, or the path of a YAML or JSON file'
        )

    @classmethod
    def _from_text(cls, text: str, where: str) -> RanncConfig:
        text = text.strip()
        if text in ("auto", '"auto"', "null", "{}"):
            return cls()
        if text.startswith("{"):
            try:
                return cls._from_section(json.loads(text), where)
            except json.JSONDecodeError as error:
                raise ValueError(f"rannc config: {where} is not valid JSON: {error}") from None
        return cls._from_section(_read_file(Path(text).expanduser(), where), text)

    @classmethod
    def _from_section(cls, section: Any, where: str) -> RanncConfig:
        if isinstance(section, Mapping) and SECTION in section:
            section, where = section[SECTION], f"{where}: {SECTION}"
        elif isinstance(section, Mapping) and _ACCELERATE_KEYS & section.keys():
            raise ValueError(
                f"rannc config: {where} is an accelerate config without a `{SECTION}:` section; "
                f"add one (`{SECTION}: auto` plans everything automatically)"
            )
        if section is None or section == "auto":
            return cls()
        if not isinstance(section, Mapping):
            raise ValueError(f'rannc config: {where} must be "auto" or a mapping of options, not {section!r}')
        known = [f.name for f in dataclasses.fields(cls)]
        for key in section:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean `{close[0]}`? " if close else ""
                raise ValueError(
                    f"rannc config: unknown option `{key}` in {where}; {hint}Known options: {', '.join(known)}"
                )
        return cls(**section)


def _read_file(path: Path, where: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f'rannc config: {where} is neither "auto", JSON, nor a file that can be read: {str(path)!r} ({reason})'
        ) from None
    try:
        # Every JSON document is also YAML.
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"rannc config: {path} is not valid YAML or JSON: {error}") from None


def _refuse(name: str, value: object, expected: str) -> None:
    raise ValueError(f"rannc config: {name}={value!r} is not {expected}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(name: str, value: object, *, minimum: int, auto: bool = False) -> None:
    if auto and value == "auto":
        return
    if not (isinstance(value, int) and _is_int(value) and value >= minimum):
        _refuse(name, value, f"a whole number of at least {minimum}" + (' or "auto"' if auto else ""))


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        _refuse(name, value, f"one of {', '.join(choices)}")


def _positive(name: str, value: object, *, auto: bool = False) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        _refuse(name, value, "a number above 0" + (' or "auto"' if auto else ""))
    assert isinstance(value, (int, float))
    return float(value)


def _replicas(value: object) -> Literal["auto"] | tuple[int, ...]:
    if value == "auto":
        return "auto"
    if not isinstance(value, (list, tuple)) or not value or not all(_is_int(n) and n >= 1 for n in value):
        _refuse("replicas", value, 'a list of whole numbers of at least 1 (one a stage) or "auto"')
    assert isinstance(value, (list, tuple))
    return tuple(value)


def _pad(value: object) -> dict[str, float]:
    if not isinstance(value, Mapping):
        _refuse("pad", value, "a mapping from field of the batch to padding value")
    assert isinstance(value, Mapping)
    for key, number in value.items():
        if not isinstance(key, str) or not isinstance(number, (int, float)):
            _refuse(f"pad[{key!r}]", number, "a number under the name of a field")
    return dict(value)
