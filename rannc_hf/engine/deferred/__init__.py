"""Models whose parameters are described instead of allocated: what was done to them is recorded, and done when needed.

`building` is what users call, `recorder` watches the operations while a model is built, `record` holds them and
does them again.
"""

from .building import deferred_init, deferred_tensor
from .values import become, digest, is_deferred, materialize, refuse_unknown, value_of

__all__ = [
    "become",
    "deferred_init",
    "deferred_tensor",
    "digest",
    "is_deferred",
    "materialize",
    "refuse_unknown",
    "value_of",
]
