"""What an Accelerator saves and loads, in one process."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from rannc_hf import RanncAccelerator
from rannc_hf.checkpoint import latest
from tests.checkpoint.runs import Tiny, batches, worst

pytestmark = pytest.mark.usefixtures("environment")


class Counter:
    """Something that a script registers for checkpointing."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Script:
    """A training script that accumulates over two batches, and draws random numbers."""

    def __init__(self, kind: type[Accelerator], folder: Path, limit: int | None = None) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        configuration = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=limit)
        self.accelerator = kind(gradient_accumulation_steps=2, project_config=configuration)
        model = Tiny(dropout=0.2 if kind is RanncAccelerator else 0.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        data = [{k: v[i] for k, v in batch.items()} for batch in batches() for i in range(8)]
        loader = DataLoader(data, batch_size=4, shuffle=True)
        teacher = torch.nn.Linear(2, 2).requires_grad_(False)
        self.model, self.optimizer, self.scheduler, self.loader, self.teacher = self.accelerator.prepare(
            model, optimizer, scheduler, loader, teacher
        )
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)

    def train(self, first: int, last: int) -> list[float]:
        """Batches `first` to `last`."""
        record = []
        for batch in self.accelerator.skip_first_batches(self.loader, first):
            if self.counter.count == last:
                break
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch)["loss"]
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.counter.count += 1
            record += [loss.item(), random.random(), float(torch.rand(())), self.scheduler.get_last_lr()[0]]
        return record


@pytest.mark.parametrize("kind", [RanncAccelerator, Accelerator], ids=lambda kind: kind.__name__)
def test_resuming_is_as_if_training_had_not_stopped(tmp_path: Path, kind: type[Accelerator]):
    """Accelerate itself is the control: what it does not restore, nobody expects of us."""
    torch.manual_seed(0)
    random.seed(0)
    script = Script(kind, tmp_path)
    script.train(0, 4)
    script.accelerator.save_state()
    wanted = script.train(4, 8)
    weights = script.accelerator.get_state_dict(script.model)
    again = Script(kind, tmp_path)
    torch.manual_seed(99)
    random.seed(99)
    with torch.no_grad():
        again.teacher.weight.zero_()
        next(iter(again.model.parameters())).zero_()
    again.accelerator.load_state()
    assert again.accelerator.step == 4
    assert torch.equal(again.teacher.weight, script.teacher.weight)
    # Whoever looks at the weights before the first batch sees those of the checkpoint.
    assert again.accelerator.get_state_dict(again.model)["embedding.weight"].abs().max() > 0
    assert again.counter.count == 4
    assert again.train(4, 8) == wanted
    assert worst(again.accelerator.get_state_dict(again.model), weights) == 0.0


def test_the_oldest_go_when_a_new_one_is_complete(tmp_path: Path):
    script = Script(RanncAccelerator, tmp_path, limit=2)
    script.train(0, 2)
    folder = tmp_path / "checkpoints"
    for expected in ({0}, {0, 1}, {1, 2}):
        saved = script.accelerator.save_state()
        assert {path.name for path in folder.iterdir()} == {f"checkpoint_{i}" for i in expected}
        assert latest(folder) == saved == folder / f"checkpoint_{max(expected)}"
    script.accelerator.project_configuration.iteration = 2
    with pytest.raises(ValueError, match="checkpoint_2 already exists"):
        script.accelerator.save_state()


def test_hooks_and_other_objects(tmp_path: Path):
    script = Script(RanncAccelerator, tmp_path)
    calls = []
    script.accelerator.register_save_state_pre_hook(lambda models, weights, path: (Path(path) / "own.txt").touch())
    script.accelerator.register_load_state_pre_hook(
        lambda models, path: calls.append((Path(path) / "own.txt").exists())
    )
    script.train(0, 2)
    script.accelerator.save_state()
    script.accelerator.load_state()
    assert calls == [True]
    script.accelerator.register_for_checkpointing(Counter())
    with pytest.raises(RuntimeError, match=r"has 1 objects of .*, this script has registered 2"):
        script.accelerator.load_state()
    with pytest.raises(ValueError, match="does not exist"):
        script.accelerator.load_state(str(tmp_path / "nothing"))


def test_loading_twice_and_saving_nothing_new(tmp_path: Path):
    script = Script(RanncAccelerator, tmp_path)
    script.train(0, 2)
    script.accelerator.save_state()
    again = Script(RanncAccelerator, tmp_path)
    again.accelerator.load_state()
    again.accelerator.load_state()
    again.accelerator.project_configuration.iteration = 1
    with pytest.raises(ValueError, match="no batch has been trained on since"):
        again.accelerator.save_state()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_0"]
    again.train(2, 4)
    again.accelerator.save_state()


def test_weights_of_a_model_that_is_not_of_transformers(tmp_path: Path):
    script = Script(RanncAccelerator, tmp_path)
    script.train(0, 2)
    for safe in (True, False):
        script.accelerator.save_model(script.model, tmp_path / str(safe), max_shard_size="1KB", safe_serialization=safe)
    files = list((tmp_path / "True").glob("*.safetensors"))
    assert len(files) > 1
    found = {name: value for file in files for name, value in load_file(file).items()}
    whole = script.accelerator.get_state_dict(script.model)
    assert worst(found, {name: whole[name] for name in whole if name != "head.weight"}) == 0.0
    assert len(list((tmp_path / "False").glob("*.bin"))) > 1
