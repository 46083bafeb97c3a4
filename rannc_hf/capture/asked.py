"""What code is told that asks whether it is being traced: the truth, or, for some models, that it is not.

Code may compute something else while it is traced (Transformers leaves out a mask that masks nothing, unless it is).
Told the truth, a model reads fewer values of the batch, so that its graph holds for more batches; and where both ways
compute the same, as they should, that is the better answer. `numbers.check_numbers` finds models where they do not.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

from torch import nn

from .ambient import in_torch

_QUESTIONS = (
    ("torch.compiler", "is_compiling"),
    ("torch.compiler", "is_exporting"),
    ("transformers.utils.import_utils", "is_fake_tensor"),
)
_plain: WeakSet[nn.Module] = WeakSet()


def tell_as_plain(model: nn.Module) -> None:
    """From now on, capture `model` as if it were not traced."""
    _plain.add(model)


def told_as_plain(model: nn.Module) -> bool:
    """Whether `model` is captured as if it were not traced."""
    return model in _plain


@contextlib.contextmanager
def answers_about_tracing(model: nn.Module) -> Iterator[None]:
    """Tell code of this thread other than PyTorch's that it is not traced, if that is how `model` is captured."""
    if not told_as_plain(model):
        yield
        return
    thread = threading.get_ident()

    def told(truth: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*args: Any) -> Any:
            if threading.get_ident() != thread or in_torch(sys._getframe(1)):
                return truth(*args)
            return False

        return answer

    before = []
    for path, name in _QUESTIONS:
        # What is not imported is not asked.
        if path in sys.modules and hasattr(sys.modules[path], name):
            before.append((sys.modules[path], name, getattr(sys.modules[path], name)))
    try:
        for module, name, truth in before:
            setattr(module, name, told(truth))
        yield
    finally:
        for module, name, truth in before:
            setattr(module, name, truth)
