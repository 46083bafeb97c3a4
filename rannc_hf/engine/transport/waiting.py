"""Waiting for one rank that works for long: it says again and again that it is alive."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def repeated(call: Callable[[], object], every_s: float) -> Iterator[None]:
    """`call()` every `every_s` seconds from another thread, while the inside runs.

    At the end, a call under way is waited for, and what one has raised is raised here, after which none was made.
    """
    over = threading.Event()
    failures: list[Exception] = []

    def run() -> None:
        while not over.wait(every_s):
            try:
                call()
            except Exception as error:
                failures.append(error)
                return

    thread = threading.Thread(target=run, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failures:
        raise failures[0]
