"""Plans for the models of RaNNC's paper, on its cluster, and for a causal LM of 175B: writes docs/planning.md.

    python benchmarks/planning_grid.py [--output docs/planning.md]

Each row is one run of `rannc plan` in a process of its own, cold; no device is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

CLUSTER = "4x8xV100-32GB,ib=100"
HIDDEN = (1024, 1536, 2048)
LAYERS = (24, 48, 96, 144, 192, 256)
MEGATRON_LIMIT = 2.5e9
"""The largest BERT that Megatron-LM trained on this cluster, as RaNNC's paper reports it."""
HEADER = """# Plans for large models

Written by `benchmarks/planning_grid.py`: `rannc plan` for the models of RaNNC's paper (M. Tanaka et al., IPDPS 2021) on
its cluster, {cluster} (4 nodes of 8 V100), BERT pretraining at sequence length 512 and global batch 256. The paper
reports that Megatron-LM trained up to about 2.5B parameters there, and RaNNC up to 12.9B. Times and memory are
predictions from the device table; nothing here was run on V100s. Where stages × replicas are more than 32,
devices run several stages; max/mean compares what devices compute in a step. Planning times are cold, on one core of
{cpu} (torch {torch}, transformers {transformers}).

| hidden | layers | parameters | beyond Megatron-LM | stages | replicas | microbatches | recompute | shard \
| max/mean device | peak GiB | samples/s | planned in s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def plan(arguments: list[str]) -> dict[str, Any]:
    """The JSON of `rannc plan`, with its own cache, and the peak of its host memory."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "RANNC_CACHE": cache, "OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-m", "rannc_hf.cli", "plan", "--json", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            return {"error": run.stderr.strip()}
        result: dict[str, Any] = json.loads(run.stdout)
        # Imports included.
        result["wall_s"] = time.perf_counter() - started
        return result


def span(values: list[Any]) -> str:
    """ "8" for equal values, "7-9" otherwise; names joined."""
    distinct = sorted(set(values))
    if len(distinct) == 1:
        return str(distinct[0])
    return f"{distinct[0]}-{distinct[-1]}" if isinstance(distinct[0], int) else " and ".join(distinct)


def row(hidden: int, layers: int, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"| {hidden} | {layers} | {result['error'].splitlines()[0]} |" + " |" * 10
    stages = result["stages"]
    times: Counter[tuple[int, ...]] = Counter()
    for stage in stages:
        times[tuple(stage["ranks"])] += stage["forward_s"] + stage["backward_s"]
    peak = max(s["peak_mem_bytes"] for s in stages) / 2**30
    beyond = result["parameters"] / MEGATRON_LIMIT
    return (
        f"| {hidden} | {layers} | {result['parameters'] / 1e9:.2f}B | {f'{beyond:.1f} ×' if beyond > 1 else ''} "
        f"| {len(stages)} | {span(result['replicas'])} | {result['microbatches']} | {span(result['recompute'])} "
        f"| {span([s['shard'] for s in stages])} | {max(times.values()) * len(times) / times.total():.2f} | {peak:.1f} "
        f"| {result['samples_per_s']:.1f} | {result['wall_s']:.0f} |"
    )


def bert(hidden: int, layers: int) -> dict[str, Any]:
    sizes = [f"hidden_size={hidden}", f"num_hidden_layers={layers}"]
    task = ["--task", "pretraining", "--batch-size", "256", "--seq-length", "512"]
    return plan(["--model", "bert-large", "--set", *sizes, *task, "--cluster", CLUSTER])


def large() -> str:
    """A causal LM of 175B for 1,024 devices."""
    size = ["--task", "causal-lm", "--batch-size", "1536", "--seq-length", "2048", "--cluster", "128x8xA100-80GB"]
    found = plan(["--model", "gpt3-175b", *size])
    assert "error" not in found, found
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    stages = found["stages"]
    peak = max(s["peak_mem_bytes"] for s in stages) / 2**30
    return (
        f"\nA causal LM of {found['parameters'] / 1e9:.0f}B parameters (GPT-2 layers; 96 × 12288, 2048 tokens) for 128 "
        f"nodes of 8 A100-80GB, global batch 1536: {len(stages)} stages of {span(found['replicas'])} replicas, "
        f"{found['microbatches']} microbatches, recompute {span(found['recompute'])}, shard "
        f"{span([s['shard'] for s in stages])}, {peak:.1f} GiB a device, {found['samples_per_s']:.1f} samples/s "
        f"predicted; planned in {found['wall_s']:.0f} s with less than {memory:.1f} GiB of host memory.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/planning.md"))
    options = parser.parse_args()
    rows = []
    for hidden in HIDDEN:
        for layers in LAYERS:
            rows.append(row(hidden, layers, bert(hidden, layers)))
            print(rows[-1], flush=True)
    about = HEADER.format(
        cluster=f"`{CLUSTER}`", cpu=platform.machine(), torch=torch.__version__, transformers=transformers.__version__
    )
    options.output.write_text(about + "\n".join(rows) + "\n" + large())


if __name__ == "__main__":
    main()
