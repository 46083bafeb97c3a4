"""What is written of a pretraining run."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import versions
from contenders.launch import device_name
from curves.picture import draw

Line = Mapping[str, Any]


def write(options: argparse.Namespace, command: Sequence[str], attempts: Sequence[Any]) -> bool:
    """NAME.json, NAME.md and, for a run of many steps, NAME.svg; whether the run was a success."""
    lines: list[Line] = attempts[-1].lines
    problem = attempts[-1].problem
    content: dict[str, Any] = {
        **versions(),
        "device": device_name(options.device),
        "devices": options.devices,
        "run": shlex.join(command),
        "config": json.loads(Path(options.config).read_text(encoding="utf-8")),
        "synthetic": options.synthetic,
        "problem": problem,
        "attempts": [
            {"seconds": a.seconds, "killed": a.killed, "last_step": a.lines[-1]["step"] if a.lines else 0}
            for a in attempts
        ],
        "phases": summaries(lines),
        "repeated": repeated(attempts) if len(attempts) > 1 else None,
        "lines": lines,
    }
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{output}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    curve = [line["loss"] for line in lines if "loss" in line]
    pictured = len(curve) >= 10
    if pictured:
        Path(f"{output}.svg").write_text(draw({"loss": spread(lines)}, []), encoding="utf-8")
    page = "\n".join(_page(output, content, pictured)) + "\n"
    Path(f"{output}.md").write_text(page, encoding="utf-8")
    print(page)
    if problem is not None:
        print(problem)
    return problem is None


def spread(lines: Sequence[Line]) -> list[float]:
    """A loss for each step: that which was logged at its end or later."""
    result: list[float] = []
    for line in lines:
        if "loss" in line:
            result += [line["loss"]] * (line["step"] - len(result))
    return result


def summaries(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """For each phase its last step, median rates, and held-out figures before and after it."""
    result = []
    for phase in sorted({line["phase"] for line in lines}):
        own = [line for line in lines if line["phase"] == phase]
        steps = [line for line in own if "samples_per_s" in line]
        held_out = [line for line in own if "held_out_loss" in line]
        summary: dict[str, Any] = {"phase": phase, "last_step": own[-1]["step"]}
        # The first window compiles and warms up.
        for name in ("samples_per_s", "tokens_per_s", "tflops_per_device", "mfu"):
            values = [line[name] for line in steps[1:] or steps if name in line]
            summary[name] = statistics.median(values) if values else None
        for name in ("predicted_over_measured", "peak_memory_gib", "predicted_memory_gib"):
            summary[name] = next((v["engine"][name] for v in reversed(steps) if name in v.get("engine", {})), None)
        # One alone is that before the first step.
        for when, line in zip(("first", "last"), (*held_out[:1], *held_out[1:][-1:])):
            for name in ("held_out_loss", "held_out_token_accuracy"):
                summary[f"{when}_{name}"] = line[name]
        result.append(summary)
    return result


def repeated(attempts: Sequence[Any]) -> dict[str, Any]:
    """What was logged twice, before a kill and after it, and how far the losses are apart."""
    first, second = (
        {v["step"]: v["loss"] for v in attempt.lines if "loss" in v} for attempt in (attempts[0], attempts[-1])
    )
    # What was logged before the checkpoint is in both, but was trained once.
    begin = attempts[-1].resumed_at
    steps = sorted(step for step in first.keys() & second.keys() if step > begin)
    differences = [abs(first[step] - second[step]) for step in steps]
    return {
        "resumed_at": begin,
        "killed_after": max(first, default=0),
        "steps": steps,
        "before": [first[step] for step in steps],
        "after": [second[step] for step in steps],
        "largest_difference": max(differences, default=None),
    }


def _page(output: Path, content: Mapping[str, Any], pictured: bool) -> Iterator[str]:
    count = f"{content['devices']} × " if content["devices"] > 1 else ""
    yield f"`{content['command']}` on {count}{content['device']}, torch {content['torch']}, transformers"
    yield f"{content['transformers']}. Started as"
    yield ""
    yield f"    {content['run']}"
    yield ""
    if content["problem"] is not None:
        yield f"**No success:** {content['problem'].splitlines()[0]}."
        yield ""
    if content["synthetic"]:
        yield "Trained on random tokens: losses mean nothing here."
        yield ""
    yield from _table(content["phases"])
    yield ""
    for number, attempt in enumerate(content["attempts"], start=1):
        last = number == len(content["attempts"])
        end = ("stopped there" if last else "killed by SIGKILL") if attempt["killed"] else "ended by itself"
        yield f"- start {number}: {attempt['seconds']:.0f} s with imports and compiling, {end}, last logged step"
        yield f"  {attempt['last_step']}"
    if (again := content["repeated"]) is not None:
        yield f"- went on from the checkpoint of step {again['resumed_at']}"
        if again["steps"]:
            yield f"- losses logged at steps {again['steps'][0]} to {again['steps'][-1]}, trained twice, differ by at"
            yield f"  most {again['largest_difference']:.2e}"
        else:
            yield "- no step was logged twice"
    yield ""
    if pictured:
        yield f"![loss of each step]({output.name}.svg)"
        yield ""
    yield from _curve(content["lines"])


def _table(phases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = {
        "phase": ("phase", "d"),
        "to step": ("last_step", "d"),
        "samples/s": ("samples_per_s", ".1f"),
        "tokens/s": ("tokens_per_s", ",.0f"),
        "TFLOP/s a device": ("tflops_per_device", ".1f"),
        "MFU": ("mfu", ".1%"),
        "predicted ÷ measured step": ("predicted_over_measured", ".2f"),
        "peak GiB (first device)": ("peak_memory_gib", ".1f"),
        "held-out loss before": ("first_held_out_loss", ".3f"),
        "after": ("last_held_out_loss", ".3f"),
        "MLM accuracy before": ("first_held_out_token_accuracy", ".1%"),
        "MLM accuracy after": ("last_held_out_token_accuracy", ".1%"),
    }
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for phase in phases:
        cells = [format(v, form) if (v := phase.get(key)) is not None else "" for key, form in columns.values()]
        yield f"| {' | '.join(cells)} |"


def _curve(lines: Sequence[Line]) -> Iterator[str]:
    """About forty rows of what was logged, and every evaluation."""
    steps = [line for line in lines if "samples_per_s" in line]
    every = max(1, len(steps) // 40)
    shown = {id(line) for line in (*steps[::every], *steps[-1:])}
    logged = "step | phase | loss | learning rate | gradient norm | samples/s"
    yield f"| {logged} | held-out loss | MLM accuracy | sentence accuracy |"
    yield "|---" * 9 + "|"
    for line in lines:
        if "held_out_loss" in line:
            pairs = line.get("held_out_next_sentence_accuracy")
            yield (
                f"| {line['step']} | {line['phase']} | | | | | {line['held_out_loss']:.3f} "
                f"| {line['held_out_token_accuracy']:.1%} | {'' if pairs is None else f'{pairs:.1%}'} |"
            )
        elif id(line) in shown:
            loss, norm = line.get("loss"), line["gradient_norm"]
            yield (
                f"| {line['step']} | {line['phase']} | {'' if loss is None else f'{loss:.3f}'} "
                f"| {line['learning_rate']:.2e} | {'' if norm is None else f'{norm:.2f}'} "
                f"| {line['samples_per_s']:.0f} | | | |"
            )
