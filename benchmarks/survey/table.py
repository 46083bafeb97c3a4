"""`docs/compatibility.md`: what a survey found, model by model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .records import BUCKETS, COUNTED, EQUAL, MISMATCH, NO_HEAD, RANDOM, REFUSED, SCRIPT, UNTRAINED
from .summary import Record, load, share

_INTRO = """# Compatibility

Written by `python benchmarks/compatibility.py --table RESULTS…` from the results of the survey; do not edit.

The survey goes over every model type of the installed Transformers that has a class which returns a loss. Each is built
from a tiny config (2 layers, or 4 where 2 cannot make 4 stages) with random weights, and trained for one step on 6
samples of unequal lengths, with images, sounds or time series of the right shapes where the class takes them, without
dropout. First plainly, in one process; then from one captured graph in 2 stages with replicas (1, 2) and in 4 stages,
in 2 microbatches, every rank with its own share of the batch. The loss and **every** gradient must equal those of the
plain model: to 1e-9 of the largest gradient where all is computed in float64, to 1e-5 where the model itself computes
parts in float32. Models with BatchNorm run in one microbatch with replicas of one, since its statistics are those of
the slice of the batch that it sees.
"""
_MEANING = {
    EQUAL: "loss and gradients equal those of one process",
    SCRIPT: "the same, with the loss computed in the script from the model's outputs; its own loss cannot be captured",
    REFUSED: "an error before training that names the module and the reason",
    "error": "another error, before any wrong gradient",
    MISMATCH: "a loss or gradient differs: a bug",
    "timeout": "more than the time limit",
    RANDOM: "not counted: two plain runs differ",
    UNTRAINED: "not counted: the survey's tiny model does not train in one process (the reason is given below)",
    NO_HEAD: "not counted: no class of the type returns a loss",
}
_RERUN = """## Run it again

    python benchmarks/compatibility.py --jobs 14 --output runs/survey       # all that is not there yet
    python benchmarks/compatibility.py --redo refused error timeout MISMATCH --output runs/survey
    python benchmarks/compatibility.py --only mixtral --verbose             # one, with its traceback
    python benchmarks/compatibility.py --table runs/survey                  # writes this page

A type is a file in the folder, so a run that was cut off goes on where it stopped; `--parts 1/3` runs a third.
"""


def write_table(results: Sequence[Path], page: Path, types: Sequence[str] = ()) -> None:
    """Write the page; the tables are of the first results, the counts of all of them.

    `types` are all that there are: the page says how many have not been run.
    """
    runs = [load(path) for path in results]
    missing = sorted({*types} - {r["type"] for r in runs[0]})
    lines = [_INTRO, "## Summary", "", "| versions | types | train plainly | equal | share |", "|---|---|---|---|---|"]
    for records in runs:
        equal, trained = share(records)
        percent = f"{100 * equal / max(trained, 1):.1f} %"
        lines.append(f"| {versions(records)} | {len(records)} | {trained} | {equal} | {percent} |")
    lines += ["", "| outcome | types | what it means |", "|---|---|---|"]
    count = Counter(r["bucket"] for r in runs[0])
    lines += [f"| {b} | {count[b]} | {_MEANING[b]} |" for b in BUCKETS if count[b] or b == MISMATCH]
    if missing:
        lines += ["", f"**Not run yet: {len(missing)} of {len(types)} types.** They count nowhere above."]
    texts = sum(r.get("inputs") == "text only" for r in runs[0] if r["bucket"] in COUNTED)
    lines += ["", f"{texts} of the models counted take images or sounds too and were trained on text only.", "", _RERUN]
    lines += _counted([r for r in runs[0] if r["bucket"] in COUNTED])
    lines += _otherwise(runs)
    lines += _others([r for r in runs[0] if r["bucket"] in (RANDOM, UNTRAINED)])
    names = ", ".join(f"`{r['type']}`" for r in runs[0] if r["bucket"] == NO_HEAD)
    lines += ["", "## No class that returns a loss", "", names]
    if missing:
        lines += ["", "## Not run yet", "", ", ".join(f"`{name}`" for name in missing)]
    page.write_text("\n".join(lines) + "\n")


def versions(records: Sequence[Record]) -> str:
    """The versions that records were made with."""
    found = {tuple(r["versions"].items()) for r in records if "versions" in r}
    return "; ".join(", ".join(f"{name} {version}" for name, version in own) for own in sorted(found)) or "not recorded"


def _counted(records: Sequence[Record]) -> list[str]:
    lines = [
        "## Models that train in one process",
        "",
        "| type | class | trained on | blocks | stages | largest difference | outcome |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        differences = r.get("differences", {})
        stages = ", ".join(sorted(differences)) or "–"
        worst = f"{max(differences.values()):.0e}" if differences else "–"
        inputs = "text only" if r.get("inputs") == "text only" else ", ".join(r.get("fields", {}))
        outcome = r["bucket"] if r["bucket"] == EQUAL else f"**{r['bucket']}**: {short(r.get('reason', ''))}"
        cells = [f"`{r['type']}`", r.get("class", "–"), inputs, str(r.get("blocks", "–")), stages, worst, outcome]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _otherwise(runs: Sequence[Sequence[Record]]) -> list[str]:
    """What of other versions is not equal in stages, and has another outcome above."""
    first = {r["type"]: r["bucket"] for r in runs[0]}
    found = [
        (r, versions([r]))
        for records in runs[1:]
        for r in records
        if r["bucket"] in COUNTED and r["bucket"] not in (EQUAL, SCRIPT, first.get(r["type"]))
    ]
    if not found:
        return []
    lines = [
        "",
        "## Other outcomes with other versions",
        "",
        "| type | class | versions | outcome |",
        "|---|---|---|---|",
    ]
    return lines + [
        f"| `{r['type']}` | {r.get('class', '–')} | {own} | **{r['bucket']}**: {short(r.get('reason', ''))} |"
        for r, own in found
    ]


def _others(records: Sequence[Record]) -> list[str]:
    lines = ["", "## Models that do not train in one process here", "", "| type | class | reason |", "|---|---|---|"]
    return lines + [f"| `{r['type']}` | {r.get('class') or '–'} | {short(r.get('reason', ''))} |" for r in records]


def short(reason: str, limit: int = 300) -> str:
    """A reason that fits a cell of a table."""
    text = " ".join(reason.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= limit else text[: limit - 1] + "…"
