"""Rows of contenders as a file of figures and a page to read; and whether all of them did the same work."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from contenders.worker import DONE

OWN = "rannc_hf"
CHECKED_STEPS = 5
Row = dict[str, Any]


def tolerance(bf16: bool, dropout: float) -> float:
    """How far losses of the first steps may be apart: by rounding, and by dropout, whose draws differ.

    A loss of 11 that is computed in bf16 is rounded by up to 0.03, and weights in bf16 move it by 0.02; norms, whose
    weights are near 1, do not notice the first updates in bf16, which adds to that with every step.
    """
    return (0.1 if bf16 else 1e-4) + (0.05 if dropout else 0.0)


def check_losses(rows: Sequence[Row], allowed: float) -> bool:
    """Compare the first losses of each row that ended with those of the first peer; note it in the rows.

    `same_work` is whether they agree. Returns whether all do.
    """
    done = [row for row in rows if row["outcome"] == DONE]
    reference = next((row for row in done if row["kind"] != OWN), done[0] if done else None)
    for row in done:
        assert reference is not None
        pairs = list(zip(row["losses"], reference["losses"]))[:CHECKED_STEPS]
        differences = [abs(a - b) for a, b in pairs]
        row["loss_difference"] = math.nan if any(map(math.isnan, differences)) else max(differences)
        row["same_work"] = row["loss_difference"] <= allowed
    return all(row["same_work"] for row in done)


def best_of(rows: Sequence[Row]) -> dict[str, Row]:
    """The fastest row of each kind, of those that did the same work."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["outcome"] == DONE and row["same_work"]:
            rival = best.setdefault(row["kind"], row)
            if row["samples_per_s"] > rival["samples_per_s"]:
                best[row["kind"]] = row
    return best


def write(output: Path, about: dict[str, Any], rows: Sequence[Row], allowed: float) -> str:
    """Write NAME.json and NAME.md; return the page."""
    output.parent.mkdir(parents=True, exist_ok=True)
    # Not with_suffix: a name may have a dot in it.
    Path(f"{output}.json").write_text(json.dumps({**about, "loss_tolerance": allowed, "rows": rows}, indent=1) + "\n")
    page = "\n".join(_page(about, rows, allowed)) + "\n"
    Path(f"{output}.md").write_text(page)
    return page


def _page(about: dict[str, Any], rows: Sequence[Row], allowed: float) -> Iterator[str]:
    yield f"`{about['command']}`: {about['title']}"
    yield ""
    yield (
        f"{about['devices']} × {about['device']}, {about['links']}; torch {about['torch']}, transformers "
        f"{about['transformers']}, CUDA {about['cuda']}, NCCL {about['nccl']}; {about['date']}."
    )
    yield ""
    yield "Each row ran in processes of its own, one after another. A step is timed whole, optimizer included, on the"
    yield "slowest device; the median counts. TFLOP/s are model FLOPs, recomputation not counted. Memory is the peak of"
    yield f"each device in the timed steps. Losses of the first {CHECKED_STEPS} steps may differ by {allowed:g}."
    yield ""
    best = best_of(rows)
    own = best.get(OWN)
    yield "| best of each | samples/s | this project ÷ it |"
    yield "|---|---|---|"
    for row in best.values():
        ratio = f"{own['samples_per_s'] / row['samples_per_s']:.2f}" if own is not None else ""
        yield f"| {row['name']} | {row['samples_per_s']:.1f} | {ratio} |"
    yield ""
    head = "contender, samples a step, samples/s, TFLOP/s a device, step ms, peak GiB, first loss, losses differ by"
    yield f"| {head.replace(',', ' |')} |"
    yield "|---|---|---|---|---|---|---|---|"
    yield from (_line(row) for row in rows)
    yield from _predictions(rows)


def _line(row: Row) -> str:
    head = f"| {row['name']}{' (1 device)' * (row['devices'] == 1)} | {row['samples']} |"
    if row["outcome"] != DONE:
        problem = row["problem"].splitlines()
        reason = f": {problem[0][:160]}" if problem and row["outcome"] != "out of memory" else ""
        return f"{head} **{row['outcome']}**{reason.replace('|', '/')} | | | | | |"
    difference = f"{row['loss_difference']:.4f}" + ("" if row["same_work"] else " **not the same work**")
    return (
        f"{head} {row['samples_per_s']:.1f} | {row['tflops']:.1f} | {row['step_s'] * 1e3:.0f} "
        f"| {_list(row['peak_gib'])} | {row['losses'][0]:.4f} | {difference} |"
    )


def _predictions(rows: Sequence[Row]) -> Iterator[str]:
    """Predicted against measured, for the rows that have a plan."""
    for row in rows:
        if "plan_used" not in row:
            continue
        plan = row["plan_used"]
        predicted = {rank: s["predicted_memory_bytes"] / 2**30 for s in plan["stages"] for rank in s["ranks"]}
        memory = [predicted[rank] for rank in sorted(predicted)]
        step = plan["step_time_us"] / 1e6
        yield ""
        yield (
            f"{row['name']}: step predicted {step * 1e3:.0f} ms, measured {row['step_s'] * 1e3:.0f} "
            f"(predicted ÷ measured {step / row['step_s']:.3f}); peak GiB predicted {_list(memory)}, "
            f"measured {_list(row['peak_gib'])}."
        )
        yield ""
        yield from ("    " + line for line in row["plan_text"].splitlines())


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)
