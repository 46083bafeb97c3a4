"""rannc_hf: automatic pipeline and data parallel training of unmodified Hugging Face models.

    batch + model ──capture──▶ Graph ──profile──▶ CostTable ──partition──▶ Plan ──engine──▶ trained stages
        ──checkpoint──▶ HF model

Each arrow is a package of the same name (`cost` for profile), each result a frozen dataclass that prints readably. A
package imports only from those left of it, and from `config`. `integrations` and `cli` are the doors users come
through, `report` is what they look at.

The names below are loaded when first used: `import rannc_hf` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rannc_hf.capture.graph import Graph
    from rannc_hf.config import RanncConfig
    from rannc_hf.engine import RanncModel
    from rannc_hf.engine.deferred import deferred_init, materialize
    from rannc_hf.integrations.accelerate import RanncAccelerator
    from rannc_hf.integrations.deferred import from_pretrained
    from rannc_hf.integrations.torch import parallelize
    from rannc_hf.integrations.trainer import RanncSeq2SeqTrainer, RanncTrainer
    from rannc_hf.integrations.training_arguments import RanncSeq2SeqTrainingArguments, RanncTrainingArguments
    from rannc_hf.partition.plan import Plan

__all__ = [
    "Graph",
    "Plan",
    "RanncAccelerator",
    "RanncConfig",
    "RanncModel",
    "RanncSeq2SeqTrainer",
    "RanncSeq2SeqTrainingArguments",
    "RanncTrainer",
    "RanncTrainingArguments",
    "deferred_init",
    "from_pretrained",
    "materialize",
    "parallelize",
]

_HOMES = {
    "Graph": "rannc_hf.capture.graph",
    "Plan": "rannc_hf.partition.plan",
    "RanncAccelerator": "rannc_hf.integrations.accelerate",
    "RanncConfig": "rannc_hf.config",
    "RanncModel": "rannc_hf.engine",
    "deferred_init": "rannc_hf.engine.deferred",
    "from_pretrained": "rannc_hf.integrations.deferred",
    "materialize": "rannc_hf.engine.deferred",
    "parallelize": "rannc_hf.integrations.torch",
    "RanncSeq2SeqTrainer": "rannc_hf.integrations.trainer",
    "RanncSeq2SeqTrainingArguments": "rannc_hf.integrations.training_arguments",
    "RanncTrainer": "rannc_hf.integrations.trainer",
    "RanncTrainingArguments": "rannc_hf.integrations.training_arguments",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
