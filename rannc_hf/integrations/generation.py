"""`generate` of the user's own model, of which no process holds all parameters."""

from __future__ import annotations

from typing import Any

from rannc_hf.engine import RanncModel
from rannc_hf.engine.attached import Attached, is_attached
from rannc_hf.integrations.meeting import meet

_LINE = "tokens = accelerator.unwrap_model(model).generate(...)"


def attach_generate(model: RanncModel) -> None:
    """Make `generate` of the user's model gather all parameters for the call, which every process makes.

    Inside `model.whole()` it is the model's own. So is its mode: as in plain Transformers, `model.eval()` is
    called before.
    """
    module = model.module
    original: Any = getattr(module, "generate", None)
    if original is None or is_attached(module, "generate"):
        return

    def generate(*args: Any, **kwargs: Any) -> Any:
        if model.is_whole:
            return original(*args, **kwargs)
        meet(model, "accelerator.unwrap_model(model).generate", _LINE)
        with model.whole():
            given = model.cast_inputs({str(i): value for i, value in enumerate(args)})
            return original(*given.values(), **model.cast_inputs(kwargs))

    Attached(module, "generate", generate)
