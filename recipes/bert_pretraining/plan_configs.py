"""Runs `rannc plan` for configs on the clusters that they name, and writes what it says.

    python plan_configs.py                    # all of configs/: writes their plans into them, and the README's table
    python plan_configs.py configs/large.json # prints the rows of one

No device is needed. Each phase has a plan of its own; a run keeps that of its first batch until it is started again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from settings import Recipe
from transformers import AutoConfig

HERE = Path(__file__).resolve().parent
ORDER = ("demo", "base", "large", "1.3B", "2.5B", "5B", "7.3B", "9.7B", "12.9B")
BEGIN, END = "<!-- written by plan_configs.py -->", "<!-- end -->"
_TOKENS = 100e9
_DAY = 86400
_COLUMNS = (
    "config",
    "parameters",
    "cluster",
    "length × batch",
    "stages",
    "replicas",
    "microbatches",
    "recompute",
    "shard",
    "peak GiB",
    "samples/s",
    "days per 100B tokens",
)


def plan(phase: Recipe) -> dict[str, Any]:
    """What `rannc plan` says of one phase, in short. Raises RuntimeError, with its message, where there is no plan."""
    assert phase.cluster is not None
    vocabulary = {"vocab_size": phase.tokenizer.vocabulary_size}
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(**{**phase.model, **vocabulary}).save_pretrained(folder)
        words = ["--model", folder, "--task", "pretraining", "--cluster", phase.cluster["devices"], "--json"]
        words += ["--batch-size", str(phase.training.batch_size), "--seq-length", str(phase.data.sequence_length)]
        words += ["--rannc", json.dumps(phase.cluster.get("options", {}))]
        run = subprocess.run(
            [sys.executable, "-m", "rannc_hf.cli", "plan", *words], capture_output=True, text=True, check=False
        )
    if run.returncode:
        raise RuntimeError(run.stderr.strip())
    return _short(json.loads(run.stdout))


def _short(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "sequence_length": found["seq_length"],
        "batch_size": found["batch_size"],
        "stages": len(found["stages"]),
        "replicas": found["replicas"],
        "microbatches": found["microbatches"],
        "recompute": sorted(set(found["recompute"])),
        "shard": sorted(set(found["shard"])),
        "peak_gib": round(max(stage["peak_mem_bytes"] for stage in found["stages"]) / 2**30, 3),
        "samples_per_s": float(f"{found['samples_per_s']:.4g}"),
        "parameters": found["parameters"],
    }


def row(name: str, cluster: str, found: dict[str, Any]) -> str:
    """A line of the table for one phase."""
    rate, length = found["samples_per_s"], found["sequence_length"]
    replicas = found["replicas"]
    cells = (
        name,
        f"{found['parameters'] / 1e9:.2f}B" if found["parameters"] > 1e8 else f"{found['parameters'] / 1e6:.1f}M",
        f"`{cluster}`",
        f"{length} × {found['batch_size']}",
        found["stages"],
        replicas[0] if len(set(replicas)) == 1 else ", ".join(map(str, replicas)),
        found["microbatches"],
        " and ".join(found["recompute"]),
        " and ".join(found["shard"]),
        f"{found['peak_gib']:.1f}" if found["peak_gib"] >= 1 else f"{found['peak_gib']:.2f}",
        f"{rate:,.0f}",
        f"{_TOKENS / (rate * length) / _DAY:,.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def rows(path: Path) -> Iterator[str]:
    """Plans all phases of a config, and writes the plans into it."""
    recipe = Recipe.load(path)
    assert recipe.cluster is not None, f"{path} names no cluster"
    plans = []
    for phase in recipe.phases():
        plans.append(plan(phase))
        yield row(path.stem, recipe.cluster["devices"], plans[-1])
    content = json.loads(path.read_text(encoding="utf-8"))
    content["cluster"]["plans"] = plans
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path)
    args = parser.parse_args()
    table = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for path in args.configs or [HERE / "configs" / f"{name}.json" for name in ORDER]:
        for line in rows(path):
            print(line, flush=True)
            table.append(line)
    if not args.configs:
        readme = HERE / "README.md"
        text = readme.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        readme.write_text("\n".join([before + BEGIN, *table, END + after]), encoding="utf-8")


if __name__ == "__main__":
    main()
