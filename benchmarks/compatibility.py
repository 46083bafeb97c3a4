"""Every model type of the installed Transformers: does it train in stages as it does in one process?

    python benchmarks/compatibility.py --jobs 4 --output runs/survey           # all, or what is not done yet
    python benchmarks/compatibility.py --only mixtral bert --verbose           # a few, with tracebacks
    python benchmarks/compatibility.py --table runs/survey                     # writes docs/compatibility.md
    python benchmarks/compatibility.py --keep runs/survey NAME.jsonl           # one file of all results

Each type is built from a tiny config with random weights and trained for one step on a padded batch, plainly and then
in 2 stages (replicas 1 and 2) and in 4, whose ranks are threads of one process. A type is a file in the output folder,
so that a run that was cut off goes on where it stopped. `--parts 1/3` runs a third.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/survey"), help="folder of the results, a file a type")
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types, done already or not")
    parser.add_argument("--redo", nargs="+", default=[], metavar="BUCKET", help="run types in these buckets again")
    parser.add_argument("--parts", default="1/1", metavar="I/N", help="the I-th of N parts of the types")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--limit-s", type=float, default=60.0, help="CPU seconds a type")
    parser.add_argument("--memory-gib", type=float, default=6.0, help="memory a type")
    parser.add_argument("--verbose", action="store_true", help="in this process, with tracebacks; for --only")
    parser.add_argument(
        "--table",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help="write docs/compatibility.md from folders or files",
    )
    parser.add_argument("--summary", type=Path, metavar="RESULTS", help="print failures grouped by reason")
    parser.add_argument(
        "--keep", nargs=2, type=Path, metavar=("FOLDER", "FILE"), help="write results to one file, a line a type"
    )
    parser.add_argument("--plain", action="store_true", help="train plainly only, to see which types can be compared")
    parser.add_argument("--list", action="store_true", help="list the types")
    return parser.parse_args()


def main() -> int:
    """Run what is asked for."""
    options = parse()
    warnings.filterwarnings("ignore")
    if options.table or options.summary or options.keep:
        return report(options)
    import torch

    torch.set_num_threads(1)
    from survey.families import model_types
    from survey.pool import path_of, run_all, write
    from survey.stages import LAYOUTS
    from survey.trial import try_type

    import rannc_hf

    names = options.only or model_types()
    if options.list:
        print("\n".join(names))
        return 0
    print(f"{len(names)} types; rannc_hf from {Path(rannc_hf.__file__).parent}, torch {torch.__version__}")
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    part, parts = map(int, options.parts.split("/"))
    names = [n for i, n in enumerate(names) if i % parts == part - 1]
    if not options.only:
        names = [n for n in names if _due(path_of(output, n), options.redo)]

    def work(name: str) -> None:
        stages = () if options.plain else tuple(LAYOUTS)
        try_type(name, lambda record: write(path_of(output, name), record), stages, options.verbose)

    if options.verbose:
        for name in names:
            work(name)
            print(path_of(output, name).read_text())
        return 0
    _preload()
    counts: Counter[str] = Counter()
    start = time.monotonic()

    def done(record: dict[str, Any]) -> None:
        counts[record["bucket"]] += 1
        at = f"{sum(counts.values())}/{len(names)} {time.monotonic() - start:.0f}s"
        print(f"{at} {record['type']}: {record['bucket']} {record.get('reason', '')[:150]}", flush=True)

    run_all(names, work, output, options.jobs, options.limit_s, options.memory_gib, done)
    print(dict(counts))
    return 0


def report(options: argparse.Namespace) -> int:
    """Write or print what results say. Status 1 for a mismatch."""
    from survey.families import model_types
    from survey.records import MISMATCH
    from survey.summary import keep, load, summary
    from survey.table import write_table

    if options.keep:
        keep(*options.keep)
    if options.summary:
        print(summary(load(options.summary)))
    if options.table:
        write_table(options.table, Path(__file__).parents[1] / "docs" / "compatibility.md", model_types())
    folders = [*(options.table or []), *([options.summary] if options.summary else [])]
    return int(any(r["bucket"] == MISMATCH for folder in folders for r in load(folder)))


def _preload() -> None:
    """Import what every trial uses, before the first fork."""
    import transformers.masking_utils
    import transformers.modeling_utils
    import transformers.models.auto  # noqa: F401

    import rannc_hf.capture
    import rannc_hf.engine
    import rannc_hf.partition.plan  # noqa: F401


def _due(path: Path, again: list[str]) -> bool:
    import json

    from survey.records import UNFINISHED

    return not path.exists() or json.loads(path.read_text())["bucket"] in (UNFINISHED, *again)


if __name__ == "__main__":
    sys.exit(main())
