"""What an Accelerator saves and loads, where no process holds the whole model."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.accelerator import Accelerator
from accelerate.checkpointing import (
    load_accelerator_state,
    load_custom_state,
    save_accelerator_state,
    save_custom_state,
)
from torch import nn

from rannc_hf.checkpoint import Staging, latest, load_from, read_manifest, save_into, save_pretrained, staged
from rannc_hf.checkpoint.directory import find
from rannc_hf.checkpoint.parts import is_transformers_model
from rannc_hf.engine import RanncModel
from rannc_hf.engine.attached import Attached, is_attached
from rannc_hf.integrations.adapters import saved_names
from rannc_hf.integrations.meeting import meet

_SHARDED_OPTIONS = {"max_shard_size", "save_original_format", "save_function", "safe_serialization", "token"}
"""Options of `save_pretrained` that need no process to have all weights."""
_STEP = "accelerate_step"
_NUMBERED = re.compile(r"checkpoint_(\d+)")


class SavingAccelerator(Accelerator):
    """The part of `RanncAccelerator` that saves and loads. Calls with a partitioned model need every process."""

    @property
    def _partitioned(self) -> list[RanncModel]:
        return [model for model in self._models if isinstance(model, RanncModel)]

    def _find(self, model: nn.Module) -> RanncModel | None:
        """The RanncModel that is `model` or holds it."""
        if isinstance(model, RanncModel):
            return model
        return next((wrapped for wrapped in self._partitioned if wrapped.module is model), None)

    # Weights

    def unwrap_model(self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """The user's own model object. Its parameters hold values only where this process owns them."""
        inner = model.module if isinstance(model, RanncModel) else model
        return super().unwrap_model(inner, keep_fp32_wrapper, keep_torch_compile)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, torch.Tensor]:
        """All weights under their Hugging Face names, on CPU, in the main process; {} in the others.

        Every process must call it.
        """
        found = self._find(model)
        if found is None:
            return super().get_state_dict(model, unwrap)
        meet(found, "accelerator.get_state_dict(model)", "state = accelerator.get_state_dict(model)")
        return found.full_state_dict()

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """As in accelerate; each process writes the weights it keeps. Every process must call it."""
        found = self._find(model)
        if found is None:
            super().save_model(model, save_directory, max_shard_size, safe_serialization)
        else:
            line = "accelerator.save_model(model, directory)"
            meet(found, line, line)
            if safe_serialization:
                save_pretrained(found, save_directory, max_shard_size=max_shard_size, weights_only=True)
            else:
                weights = _Weights(found.full_state_dict())
                if self.is_main_process:
                    super().save_model(weights, save_directory, max_shard_size, safe_serialization)
        self.wait_for_everyone()

    # States

    def save_state(self, output_dir: str | None = None, safe_serialization: bool = True, **kwargs: Any) -> Any:
        """As in accelerate, but sharded, and complete or absent: see `rannc_hf.checkpoint`. Every process must call it.

        With `total_limit`, older checkpoints go when the new one is complete.
        """
        if not self._partitioned:
            return super().save_state(output_dir, safe_serialization, **kwargs)
        (model,) = self._partitioned
        line = "accelerator.save_state(directory)"
        meet(model, line, line, always=True)
        target = self._target(output_dir)
        with staged(target, model.transport) as staging:
            self._save_parts(staging, model, safe_serialization)
        self.project_configuration.iteration += 1
        if self.project_configuration.automatic_checkpoint_naming and self.is_main_process:
            _rotate(target.parent, self.project_configuration.total_limit)
        self.wait_for_everyone()
        return target

    def _target(self, output_dir: str | None) -> Path:
        if not self.project_configuration.automatic_checkpoint_naming:
            if output_dir is None:
                raise ValueError(
                    "save_state needs output_dir, or `automatic_checkpoint_naming` in ProjectConfiguration"
                )
            return Path(output_dir)
        target = Path(self.project_dir) / "checkpoints" / f"checkpoint_{self.save_iteration}"
        if target.exists():
            raise ValueError(
                f"checkpoint directory {target} already exists; set "
                f"`accelerator.project_configuration.iteration` to the number to go on with"
            )
        return target

    def _save_parts(self, staging: Staging, model: RanncModel, safe_serialization: bool) -> None:
        path, on_each_node = str(staging.path), self.project_configuration.save_on_each_node
        save_into(staging, model)
        staging.header[_STEP] = self.step
        whole = [super(SavingAccelerator, self).get_state_dict(m, unwrap=False) for m in self._whole_models]
        for hook in self._save_model_state_pre_hook.values():
            hook(self._models, whole, path)
        save_accelerator_state(
            path,
            whole,
            self._other_optimizers(model),
            self._schedulers,
            self._dataloaders,
            self.state.process_index,
            self.step,
            self.scaler,
            save_on_each_node=on_each_node,
            safe_serialization=safe_serialization,
        )
        for index, custom in enumerate(self._custom_objects):
            save_custom_state(custom, path, index, save_on_each_node=on_each_node)

    def load_state(
        self, input_dir: str | None = None, load_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As in accelerate, on any number of processes and under any plan. Every process must call it.

        Without `input_dir`, with automatic naming: the last complete checkpoint. May be called before the first batch.
        """
        if not self._partitioned:
            super().load_state(input_dir, load_kwargs, **kwargs)
            return
        (model,) = self._partitioned
        directory = self._source(input_dir)
        load_from(directory, model)
        path = find(directory)
        for hook in self._load_model_state_pre_hook.values():
            hook(self._models, str(path))
        load_accelerator_state(
            str(path),
            self._whole_models,
            self._other_optimizers(model),
            self._schedulers,
            self._dataloaders,
            self.state.process_index,
            self.scaler,
            kwargs.pop("map_location", None),
            load_kwargs,
            **kwargs,
        )
        self.step = read_manifest(directory)[_STEP]
        found = len(list(path.glob("custom_checkpoint_*.pkl")))
        if found != len(self._custom_objects):
            raise RuntimeError(
                f"checkpoint {directory} has {found} objects of `register_for_checkpointing`, this script has "
                f"registered {len(self._custom_objects)}"
            )
        for index, custom in enumerate(self._custom_objects):
            load_custom_state(custom, str(path), index)

    def _source(self, input_dir: str | None) -> Path:
        if input_dir is not None:
            return Path(os.path.expanduser(input_dir))
        if not self.project_configuration.automatic_checkpoint_naming:
            raise ValueError("load_state needs an input_dir, or `automatic_checkpoint_naming` in ProjectConfiguration")
        folder = Path(self.project_dir) / "checkpoints"
        found = latest(folder)
        if found is None:
            raise ValueError(f"there is no complete checkpoint in {folder}")
        return found

    @property
    def _whole_models(self) -> list[nn.Module]:
        """Models without trainable parameters, which every process holds."""
        return [model for model in self._models if not isinstance(model, RanncModel)]

    def _other_optimizers(self, model: RanncModel) -> list[Any]:
        return [o for o in self._optimizers if o.optimizer not in model.optimizers.registered]


class _Weights(nn.Module):
    """Has nothing but a state dict, for accelerate to write."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._weights = weights

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._weights


def _rotate(folder: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints of `folder` beyond `limit`."""
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _NUMBERED.fullmatch(path.name))]
    for _, path in sorted(numbered)[: -max(limit, 1)] if limit is not None else ():
        shutil.rmtree(path)


def attach_save_pretrained(model: RanncModel) -> None:
    """Make `save_pretrained` of the user's model write all weights, called on every process.

    Given a `state_dict`, or before the first batch, it is the model's own, in the main process alone where the former
    is the case.
    """
    module = model.module
    original = getattr(module, "save_pretrained", None)
    if original is None or is_attached(module, "save_pretrained"):
        return

    def save(save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        names = ("is_main_process", "state_dict")
        given = dict(zip(names, args)) | kwargs
        if given.get("state_dict") is not None:
            return original(save_directory, **given)
        if not model.partitioned:
            return original(save_directory, **given) if model.transport.rank == 0 else None
        line = "accelerator.unwrap_model(model).save_pretrained(directory)"
        meet(model, line, line)
        options = {k: v for k, v in given.items() if k not in names}
        if is_transformers_model(module) and options.keys() <= _SHARDED_OPTIONS:
            return save_pretrained(model, save_directory, **options)
        state = model.full_state_dict(saved_names(module))
        if model.transport.rank == 0:
            original(save_directory, is_main_process=True, state_dict=state, **options)
        return model.transport.barrier(line)

    Attached(module, "save_pretrained", save)
