"""Puts our classes in the place of accelerate's and Transformers', in a process that runs somebody's script."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TRAINERS = ("transformers.trainer", "transformers.trainer_seq2seq")


def replace_classes() -> None:
    """Replace Accelerator now, and the trainers when the script imports them.

    Transformers' trainer takes a second to import, and is not imported for scripts that do without.
    """
    import accelerate
    import accelerate.accelerator

    from rannc_hf.config import RanncConfig
    from rannc_hf.integrations.accelerate import RanncAccelerator
    from rannc_hf.integrations.deferred import defer_models

    accelerate.Accelerator = accelerate.accelerator.Accelerator = RanncAccelerator
    if RanncConfig.load().deferred_init:
        # Scripts may build the model before the Accelerator.
        defer_models()
    if any(name in sys.modules for name in _TRAINERS):
        _replace_trainers()
    else:
        sys.meta_path.insert(0, _BeforeTrainers())


def _replace_trainers() -> None:
    import transformers
    from transformers import trainer, trainer_seq2seq

    from rannc_hf.integrations.trainer import RanncSeq2SeqTrainer, RanncTrainer

    trainer.Trainer = trainer_seq2seq.Trainer = transformers.Trainer = RanncTrainer
    trainer_seq2seq.Seq2SeqTrainer = transformers.Seq2SeqTrainer = RanncSeq2SeqTrainer


class _BeforeTrainers(MetaPathFinder):
    """Waits for the first import of a trainer, imports and replaces both, and hands out what is there then."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _TRAINERS:
            return None
        sys.meta_path.remove(self)
        _replace_trainers()
        module = sys.modules[name]
        # Python looks at the specification of a module that has appeared while it looked for it.
        module.__spec__ = ModuleSpec(name, _Imported(module))
        return module.__spec__


class _Imported(Loader):
    """Gives a module that has been imported already."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec
