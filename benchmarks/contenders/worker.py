"""One rank of one contender: builds it, trains it, writes what it measured. Started by `launch.py` under torchrun.

    torchrun … -m contenders.worker SPEC.json

Writes rankR.json beside SPEC.json: seconds and losses of all steps, peak memory, or what went wrong.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from contenders.presets import Contender
from contenders.training import Place
from contenders.work import Model

BUILDERS = {
    "transformers": "contenders.replicated",
    "ddp": "contenders.replicated",
    "fsdp2": "contenders.replicated",
    "pipelining": "contenders.pipelining",
    "rannc_hf": "contenders.own",
}
OUT_OF_MEMORY = "out of memory"
FAILED = "failed"
DONE = "done"


@dataclass(frozen=True)
class Spec:
    """What the ranks of a contender are told."""

    model: Model
    contender: Contender
    unique: int
    dropout: float
    bf16: bool
    device: str
    steps: int
    warmup: int
    limit_s: float

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Spec:
        data = json.loads(path.read_text())
        return cls(**data | {"model": Model(**data["model"]), "contender": Contender(**data["contender"])})


def main() -> NoReturn:
    path = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    spec = Spec.load(path)
    (path.parent / f"rank{rank}.pid").write_text(str(os.getpid()))
    faulthandler.dump_traceback_later(0.9 * spec.limit_s)
    try:
        result = _measure(spec, _start(spec, rank))
    except Exception as error:
        trace = traceback.format_exc()
        result = {"outcome": _outcome(error), "problem": str(error).strip() or repr(error), "traceback": trace}
        print(trace, file=sys.stderr, flush=True)
    (path.parent / f"rank{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    # No orderly end: after a failure the other ranks may wait for this one for ever, and torchrun ends them.
    os._exit(0 if result["outcome"] == DONE else 1)


def _start(spec: Spec, rank: int) -> Place:
    devices = int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if spec.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=spec.limit_s))
    return Place(spec.model, spec.contender, spec.unique, spec.dropout, spec.bf16, rank, devices, device, spec.limit_s)


def _measure(spec: Spec, place: Place) -> dict[str, Any]:
    started = time.perf_counter()
    torch.manual_seed(place.rank)
    training = importlib.import_module(BUILDERS[place.contender.kind]).build(place)
    seconds, losses, setup_peak = [], [], 0
    for index in range(spec.warmup + spec.steps):
        if index == spec.warmup:
            setup_peak = _peak(place.device)
            setup_s = time.perf_counter() - started
        _together(place.device)
        begin = time.perf_counter()
        loss = training.step()
        _synchronize(place.device)
        seconds.append(time.perf_counter() - begin)
        losses.append(loss)
    # No rank ends while another still waits for it.
    _together(place.device)
    return {
        "outcome": DONE,
        "step_s": seconds[spec.warmup :],
        "warmup_s": seconds[: spec.warmup],
        "losses": [None if loss is None else loss.item() for loss in losses],
        "peak_bytes": _peak(place.device),
        "setup_peak_bytes": setup_peak,
        "setup_s": setup_s,
        **training.facts(),
    }


def _peak(device: torch.device) -> int:
    """Most bytes handed out by the allocator since the last call; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def _together(device: torch.device) -> None:
    """All ranks have come here, and their devices have nothing left to do."""
    flag = torch.zeros(1, device=device)
    dist.all_reduce(flag)
    _synchronize(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _outcome(error: Exception) -> str:
    """Running out of memory is a result; also where another library, or another rank, says it in words."""
    words = f"{type(error).__name__}: {error}".lower()
    signs = ("outofmemoryerror", "out of memory", "alloc_failed")
    return OUT_OF_MEMORY if any(sign in words for sign in signs) else FAILED


if __name__ == "__main__":
    main()
