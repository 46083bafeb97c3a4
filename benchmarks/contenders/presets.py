"""What runs: sizes of the model, and for each contender the shapes of batches that are tried."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contenders.work import Model

KINDS = ("transformers", "ddp", "fsdp2", "pipelining", "rannc_hf")


@dataclass(frozen=True)
class Contender:
    """One way to train, with one shape of batch."""

    kind: str
    """One of `KINDS`: plain Transformers on one device; DistributedDataParallel; `fully_shard` on each layer;
    torch.distributed.pipelining cut by hand; this project."""
    batch: int
    """Samples of a microbatch: of each device, in a pipeline of all devices. This project: samples of each device in a
    step, which its planner cuts into microbatches."""
    microbatches: int = 1
    """Microbatches in a step; 1 for this project."""
    compiled: bool = False
    """Each layer by `torch.compile`. This project compiles blocks by itself where it can."""
    recompute: bool = False
    """Each layer is computed again in the backward. This project's planner decides by itself."""
    reduce_each: bool = False
    """FSDP2: gradients are reduced after every microbatch, so that no device keeps whole ones, and not once a step."""
    plan: str | None = None
    """This project: path of a plan to train with, in the place of the planner's own."""

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind
        assert self.kind != "rannc_hf" or self.microbatches == 1

    @property
    def name(self) -> str:
        """Unique within a preset."""
        if self.kind == "rannc_hf":
            plan = f"plan {Path(self.plan).stem}" if self.plan else "own plan"
            return f"rannc_hf, {plan}, {self.batch} a device"
        words = [self.kind, f"{self.batch}x{self.microbatches}"]
        flags = {"compiled": self.compiled, "recompute": self.recompute, "reduce each": self.reduce_each}
        return ", ".join(words + [word for word, on in flags.items() if on])

    def devices(self, available: int) -> int:
        return 1 if self.kind == "transformers" else available

    def samples(self, devices: int) -> int:
        """Samples of a step on all `devices`."""
        replicas = 1 if self.kind == "pipelining" else devices
        return self.batch * self.microbatches * replicas

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Preset:
    """A model, the contenders that train it, and how long."""

    model: Model
    contenders: tuple[Contender, ...]
    unique: int
    """Different samples; every step's batch repeats them."""
    steps: int
    warmup: int
    limit_s: int
    """Seconds that one contender may take, start included."""


def _peer(kind: str, shape: str, *flags: str) -> Contender:
    """`shape` is SAMPLESxMICROBATCHES."""
    batch, microbatches = map(int, shape.split("x"))
    compiled, recompute, reduce_each = (flag in flags for flag in ("compiled", "recompute", "reduce_each"))
    return Contender(kind, batch, microbatches, compiled, recompute, reduce_each)


def _own(samples: int) -> Contender:
    return Contender("rannc_hf", samples)


PRESETS = {
    "tiny": Preset(
        Model(layers=4, hidden=64, heads=2, length=32, vocabulary=512),
        (
            _peer("transformers", "8x2"),
            _peer("ddp", "8x1"),
            _peer("ddp", "4x4"),
            _peer("fsdp2", "8x1"),
            _peer("fsdp2", "4x4", "recompute"),
            _peer("fsdp2", "4x4", "reduce_each"),
            _peer("pipelining", "4x4"),
            _own(8),
        ),
        unique=4,
        steps=4,
        warmup=2,
        limit_s=280,
    ),
    "bert-large": Preset(
        Model(layers=24, hidden=1024, heads=16),
        (
            _own(256),
            _own(128),
            _peer("ddp", "64x4", "compiled"),
            _peer("ddp", "64x4"),
            _peer("ddp", "32x1"),
            _peer("ddp", "32x1", "compiled"),
            _peer("pipelining", "16x16", "compiled"),
            _peer("pipelining", "16x16"),
            _peer("pipelining", "32x16", "compiled"),
            _peer("fsdp2", "64x4", "compiled"),
            _peer("fsdp2", "32x1"),
            _peer("transformers", "32x4", "compiled"),
            _peer("transformers", "32x4"),
        ),
        unique=8,
        steps=8,
        warmup=3,
        limit_s=200,
    ),
    "bert-5b": Preset(
        Model(layers=96, hidden=2048, heads=32),
        (
            _own(128),
            _own(64),
            _peer("fsdp2", "16x4"),
            _peer("fsdp2", "16x4", "compiled"),
            _peer("fsdp2", "16x4", "reduce_each"),
            _peer("fsdp2", "32x2", "recompute"),
            _peer("pipelining", "4x32"),
            _peer("pipelining", "8x16", "compiled"),
            _peer("ddp", "4x8", "compiled"),
            _peer("ddp", "8x8", "recompute"),
            _peer("transformers", "8x4", "recompute"),
        ),
        unique=4,
        steps=5,
        warmup=2,
        limit_s=300,
    ),
    "bert-12.9b": Preset(
        Model(layers=256, hidden=2048, heads=32),
        (
            _own(32),
            _own(64),
            _peer("fsdp2", "16x2", "recompute"),
            _peer("fsdp2", "16x2", "recompute", "reduce_each"),
            _peer("fsdp2", "16x2", "recompute", "reduce_each", "compiled"),
            _peer("fsdp2", "32x1", "recompute"),
            _peer("pipelining", "4x16", "recompute"),
        ),
        unique=4,
        steps=4,
        warmup=2,
        limit_s=400,
    ),
}
