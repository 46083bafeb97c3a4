"""What a trial finds out, kept in a file from the first moment."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

EQUAL, REFUSED, MISMATCH, TIMEOUT = "equal", "refused", "MISMATCH", "timeout"
SCRIPT = "equal, loss in the script"
ERROR, UNTRAINED, NO_HEAD, RANDOM = "error", "does not train plainly", "no head that trains", "random"
PLAIN, UNFINISHED = "trains plainly", "unfinished"
BUCKETS = (EQUAL, SCRIPT, REFUSED, ERROR, MISMATCH, TIMEOUT, RANDOM, UNTRAINED, NO_HEAD)
COUNTED = (EQUAL, SCRIPT, REFUSED, ERROR, MISMATCH, TIMEOUT)
"""Buckets of the models that train in one process."""


Save = Callable[[dict[str, Any]], None]


@dataclass
class Trial:
    """What is known of a model type so far; `save` is called whenever something is added."""

    model_type: str
    save: Save
    verbose: bool = False
    record: dict[str, Any] = field(default_factory=dict)

    def note(self, **facts: Any) -> None:
        self.record.update(facts)
        self.save(self.record)

    def fail(self, bucket: str, error: BaseException) -> None:
        """End with a bucket, the reason, and the end of the traceback."""
        trace = "".join(traceback.format_exception(error))
        self.note(bucket=bucket, reason=reason_of(error), error=type(error).__name__, traceback=trace[-6000:])
        if self.verbose:
            print(trace)


def reason_of(error: BaseException) -> str:
    """The message without ranks, addresses and what follows the first lines."""
    text = re.sub(r"^rank \d+: ", "", str(error).strip())
    text = re.sub(r"0x[0-9a-f]+", "0x…", text)
    # Advice comes between the reason, and why the module cannot run as it is.
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith((" - ", "What to try"))]
    return f"{type(error).__name__}: " + " ".join(lines[:4])[:700]
