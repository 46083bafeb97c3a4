"""Plans each model of models/ on a cluster of its size, and writes the table in README.md. Needs no device.

    python plan_models.py [125m 175b …]

Batches are about those of Brown et al. 2020, samples have 2,048 tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LENGTH = 2048
TOKENS = 100e9
"""Trained in the days of the table."""
CASES = {
    "125m": ("1x8xA100-40GB", 256),
    "350m": ("1x8xA100-40GB", 256),
    "1.3b": ("1x8xA100-80GB", 512),
    "2.7b": ("2x8xA100-80GB", 512),
    "6.7b": ("4x8xA100-80GB", 1024),
    "13b": ("8x8xA100-80GB", 1024),
    "30b": ("16x8xA100-80GB", 1024),
    "66b": ("32x8xA100-80GB", 1024),
    "175b": ("128x8xA100-80GB", 1536),
}
"""Model to its cluster and the samples of a step."""
BEGIN, END = "<!-- plans: written by plan_models.py -->\n", "<!-- end of plans -->\n"
COLUMNS = (
    "model",
    "parameters",
    "cluster",
    "samples a step",
    "stages × replicas",
    "microbatches",
    "recompute",
    "shard",
    "peak GiB",
    "step s",
    "days for 100B tokens",
)


def command(name: str) -> list[str]:
    """The command line that plans a model."""
    cluster, samples = CASES[name]
    size = ["--batch-size", str(samples), "--seq-length", str(LENGTH)]
    return ["rannc", "plan", "--model", f"models/{name}.json", "--task", "causal-lm", *size, "--cluster", cluster]


def plan(name: str) -> dict[str, Any]:
    """What `rannc plan --json` says of a model. Raises ValueError with its reasons where nothing fits."""
    words = [sys.executable, "-m", "rannc_hf.cli", *command(name)[1:], "--json"]
    run = subprocess.run(words, cwd=HERE, capture_output=True, text=True, check=False)
    if run.returncode:
        raise ValueError(f"{name}: {run.stderr.strip()}")
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    cluster, samples = CASES[name]
    stages = found["stages"]
    days = TOKENS / (LENGTH * found["samples_per_s"]) / 86400
    cells = (
        name.upper(),
        f"{found['parameters'] / 1e9:.3g}B",
        f"`{cluster}`",
        samples,
        f"{len(stages)} × {_words(found['replicas'])}",
        found["microbatches"],
        _words(found["recompute"]),
        _words([stage["shard"] for stage in stages]),
        f"{max(stage['peak_mem_bytes'] for stage in stages) / 2**30:.1f}",
        f"{found['step_time_s']:.2f}",
        f"{days:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _words(values: list[Any]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(CASES)}; all write the table")
    names = parser.parse_args().models
    if unknown := sorted(set(names) - set(CASES)):
        parser.error(f"unknown model {', '.join(unknown)}; known are {', '.join(CASES)}")
    rows = []
    for name in names or CASES:
        rows.append(row(name, plan(name)))
        print(rows[-1], flush=True)
    if not names:
        readme = HERE / "README.md"
        before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
        table = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *rows]
        readme.write_text(before + BEGIN + "\n".join(table) + "\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
