"""Calls of a script that need all processes, and say so where they have not all come."""

from __future__ import annotations

from rannc_hf.engine import RanncModel
from rannc_hf.engine.transport import TransportError

_LONE_S = 30.0
"""How long the main process waits for the others before it says that it seems to be alone."""


def meet(model: RanncModel, call: str, line: str, always: bool = False) -> None:
    """Return when all processes have come to `call`, which before the first batch may need none but one.

    Args:
        line: how to call it, for the error.
        always: it needs all of them before the first batch too.

    Raises:
        RuntimeError: when the others do something else, or do not come to the main process in time: it is likely alone,
            under `if accelerator.is_main_process`, and would wait for ever.
    """
    if not (model.partitioned or always):
        return
    try:
        model.transport.meet(call, _LONE_S if model.transport.rank == 0 else None)
    except TransportError as error:
        raise RuntimeError(
            f"`{call}` needs all processes, for none holds the whole model, but not all have called it. Call it on "
            f"every process, outside of `if accelerator.is_main_process`:\n    {line}\n({error})"
        ) from error
