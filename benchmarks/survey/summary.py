"""The results of a survey in short: how many in which bucket, and failures grouped by reason."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from .records import BUCKETS, COUNTED, EQUAL, SCRIPT, UNFINISHED

Record = dict[str, Any]


def load(results: Path) -> list[Record]:
    """All finished records of a folder, by type, or those that `keep` wrote."""
    if results.is_file():
        return [json.loads(line) for line in results.read_text().splitlines()]
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    return [r for r in records if r["bucket"] != UNFINISHED]


def keep(results: Path, file: Path) -> None:
    """Write the records to one file, a line each, without tracebacks."""
    lines = [json.dumps({k: v for k, v in r.items() if k != "traceback"}) for r in load(results)]
    file.write_text("\n".join(lines) + "\n")


def counts(records: list[Record]) -> dict[str, int]:
    """How many types are in each bucket."""
    found = Counter(r["bucket"] for r in records)
    return {bucket: found[bucket] for bucket in BUCKETS if found[bucket]}


def share(records: list[Record]) -> tuple[int, int]:
    """How many types train in stages as they do plainly, and how many train plainly."""
    return sum(r["bucket"] in (EQUAL, SCRIPT) for r in records), sum(r["bucket"] in COUNTED for r in records)


def kind_of(reason: str) -> str:
    """A reason without what differs from model to model."""
    text = re.sub(r"the step of \w+", "the step", reason)
    text = re.sub(r"module '[^']*'", "module", text)
    text = re.sub(r"\w+\.py:\d+", "file", text)
    text = re.sub(r"'[\w.]+'", "'…'", text)
    return re.sub(r"\d+", "N", text)[:300]


def summary(records: list[Record]) -> str:
    """Markdown: counts, then failures by reason, the most frequent first."""
    equal, trained = share(records)
    lines = [f"# {len(records)} types: {equal} of {trained} that train plainly are equal in 2 and 4 stages", ""]
    lines += [f"- {bucket}: {count}" for bucket, count in counts(records).items()]
    for bucket in BUCKETS:
        if bucket == EQUAL:
            continue
        groups: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            if record["bucket"] == bucket:
                groups[kind_of(record.get("reason", ""))].append(record)
        if groups:
            lines += ["", f"## {bucket}", ""]
        for group in sorted(groups.values(), key=len, reverse=True):
            names = ", ".join(r["type"] for r in group)
            lines += [f"- **{len(group)}**: {names}", f"  `{group[0]['type']}`: {group[0].get('reason', '')[:600]}"]
    return "\n".join(lines) + "\n"
