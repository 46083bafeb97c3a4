"""Checkpoints of a run: made every few steps, the old ones removed, the last complete one found again.

`OUTPUT/checkpoints/step_00000500` is what `accelerator.save_state` writes: model, optimizer, random states. Beside it,
`step_00000500.json` says where the run was. It is written last and appears at once, so that a checkpoint without it is
not complete, and is never read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from settings import Recipe

_NAME = re.compile(r"step_(\d{8})\.json")


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run was when its checkpoint was made."""

    step: int
    """Steps done, over all phases. With the config it says the phase, the samples trained on and the learning rate."""

    metrics_bytes: int
    """Size of metrics.jsonl, on the main process: what was written later is written again."""

    guard: dict[str, Any]
    """State of the divergence guard."""


class Checkpoints:
    """The checkpoints of one run folder. All methods are called on every process."""

    def __init__(self, accelerator: Accelerator, output: Path, recipe: Recipe) -> None:
        self._accelerator = accelerator
        self._folder = output / "checkpoints"
        self._keep = recipe.training.keep_checkpoints
        self._identity = _identity(recipe)

    def last(self) -> Path | None:
        """The newest complete checkpoint, as the main process sees it."""
        found = self._complete()[-1:] if self._accelerator.is_main_process else []
        name = broadcast_object_list([str(found[0]) if found else None])[0]
        return None if name is None else Path(name)

    def save(self, position: Position) -> None:
        """Makes a checkpoint, then removes those that are too many. All processes see one file system."""
        folder = self._folder / f"step_{position.step:08d}"
        if self._accelerator.is_main_process:
            self._folder.mkdir(parents=True, exist_ok=True)
            # A run that was killed at this point has left a part of it.
            _remove(folder)
        self._accelerator.wait_for_everyone()
        self._accelerator.save_state(str(folder))
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            content = {
                "step": position.step,
                "metrics_bytes": position.metrics_bytes,
                "guard": position.guard,
                "config": self._identity,
            }
            _write(_marker(folder), json.dumps(content))
            for old in self._complete()[: -self._keep]:
                _remove(old)

    def load(self, folder: Path) -> Position:
        """Puts model, optimizer and random states back; they are prepared already.

        Raises ValueError for the checkpoint of a run that differs in what makes its data and model.
        """
        content = json.loads(_marker(folder).read_text(encoding="utf-8"))
        for key, value in self._identity.items():
            if content["config"][key] != value:
                raise ValueError(
                    f"{folder} was trained with another {key}: {content['config'][key]}, but the config says {value}. "
                    "Go on with that, or train into another folder"
                )
        self._accelerator.load_state(str(folder))
        return Position(content["step"], content["metrics_bytes"], content["guard"])

    def _complete(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        names = sorted(path.name for path in self._folder.iterdir() if _NAME.fullmatch(path.name))
        return [folder for name in names if (folder := self._folder / name.removesuffix(".json")).is_dir()]


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What has to stay as it is when a run goes on: other learning rates, for example, may be tried."""
    phases = [[p.data.sequence_length, p.training.batch_size, p.training.steps] for p in recipe.phases()]
    # A run may be made longer.
    phases[-1].pop()
    return {
        "model": recipe.model,
        "optimizer": recipe.training.optimizer,
        "seed": recipe.training.seed,
        "phases (length, batch, steps)": phases,
    }


def _marker(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _remove(folder: Path) -> None:
    # The marker first: what is half removed is not complete.
    _marker(folder).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _write(path: Path, text: str) -> None:
    """The file appears with all of its content, and is on disk when this returns."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
