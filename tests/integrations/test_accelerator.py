"""RanncAccelerator in one process: what scripts do with it, against accelerate's own."""

import contextlib
import itertools
import json
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs
from safetensors.torch import load_file
from torch import nn

from rannc_hf import RanncAccelerator, RanncModel
from rannc_hf.engine.optimizer import OptimizerMap

pytestmark = pytest.mark.usefixtures("environment")


class Regression(nn.Module):
    """Returns its loss, like a Hugging Face model; one weight is used twice."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, inputs, targets=None):
        outputs = self.second(torch.tanh(self.first(inputs)))
        result = {"outputs": outputs}
        if targets is not None:
            result["loss"] = nn.functional.mse_loss(outputs, targets)
        return result


def batches(count):
    generator = torch.Generator().manual_seed(5)
    return [{k: torch.randn(8, 4, generator=generator) for k in ("inputs", "targets")} for _ in range(count)]


def train(accelerator, prepare, clip):
    inner = Regression()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    model, optimizer, scheduler = prepare(accelerator, inner, optimizer, scheduler)
    record = []
    for batch in batches(6):
        with accelerator.accumulate(model):
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                record.append(float(clip(accelerator, model) or 0))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        record += [loss.item(), scheduler.get_last_lr()[0]]
    return record, accelerator.get_state_dict(model), model


def together(accelerator, model, optimizer, scheduler):
    return accelerator.prepare(model, optimizer, scheduler)


def model_last(accelerator, model, optimizer, scheduler):
    scheduler, optimizer, model = accelerator.prepare(scheduler, optimizer, model)
    return model, optimizer, scheduler


def one_by_one(accelerator, model, optimizer, scheduler):
    optimizer = accelerator.prepare(optimizer)
    scheduler = accelerator.prepare(scheduler)
    return accelerator.prepare(model), optimizer, scheduler


def by_norm(accelerator, model):
    return accelerator.clip_grad_norm_(model.parameters(), 0.1)


def by_value(accelerator, model):
    return accelerator.clip_grad_value_(accelerator.unwrap_model(model).parameters(), 0.01)


@pytest.mark.parametrize("prepare, clip", itertools.product([together, model_last, one_by_one], [by_norm, by_value]))
def test_training_equals_accelerate(prepare, clip, monkeypatch):
    registered = []
    register = RanncModel.register_optimizer
    monkeypatch.setattr(RanncModel, "register_optimizer", lambda m, o: registered.append(type(o)) or register(m, o))
    expected, weights, _ = train(Accelerator(gradient_accumulation_steps=2), prepare, clip)
    AcceleratorState._reset_state(reset_partial_state=True)
    ours, our_weights, model = train(RanncAccelerator(gradient_accumulation_steps=2), prepare, clip)
    assert isinstance(model, RanncModel) and model.partitioned
    assert registered == [torch.optim.SGD]
    assert ours == pytest.approx(expected, rel=1e-5)
    assert our_weights.keys() == weights.keys() == {"first.weight", "first.bias", "second.weight", "second.bias"}
    for name, value in weights.items():
        torch.testing.assert_close(our_weights[name], value, rtol=1e-5, atol=1e-6)


def test_bf16_computes_in_bf16_and_gives_fp32():
    accelerator = RanncAccelerator(mixed_precision="bf16")
    model = accelerator.prepare(Regression())
    assert model.compute_dtype == torch.bfloat16
    (batch,) = batches(1)
    loss = model(**batch)["loss"]
    accelerator.backward(loss)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    exact = Regression()(**batch)["loss"].item()
    assert loss.item() != exact and loss.item() == pytest.approx(exact, rel=0.02)
    model.eval()
    with torch.no_grad():
        assert model(batch["inputs"])["outputs"].dtype == torch.float32


def test_autocast_around_the_model_changes_nothing():
    results = []
    surrounds = (
        lambda accelerator: contextlib.nullcontext(),
        lambda accelerator: accelerator.autocast(),
        lambda accelerator: torch.autocast("cpu"),
    )
    for surround in surrounds:
        accelerator = RanncAccelerator(mixed_precision="bf16")
        model = accelerator.prepare(Regression())
        (batch,) = batches(1)
        with surround(accelerator):
            loss = model(**batch)["loss"]
        accelerator.backward(loss)
        model.eval()
        with torch.no_grad(), surround(accelerator):
            outputs = model(batch["inputs"])["outputs"]
        results.append([loss.detach(), outputs, *(p.grad for p in model.parameters())])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_nothing_of_a_model_stays_after_free_memory():
    accelerator = RanncAccelerator(mixed_precision="fp16")
    losses = []
    for _ in range(2):
        inner = Regression()
        held = [weakref.ref(inner), *(weakref.ref(p) for p in inner.parameters())]
        model, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=0.1))
        for batch in batches(2):
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        assert accelerator.rannc_figures() != {}
        del inner, loss, batch, model, optimizer
        accelerator.free_memory()
        assert [ref() for ref in held] == [None] * len(held)
        assert accelerator.rannc_figures() == {}
    assert losses[0] == losses[1]


def test_figures_and_a_line_a_step(tmp_path, capsys):
    path = tmp_path / "logs" / "steps.jsonl"
    accelerator = RanncAccelerator(rannc={"log": str(path), "progress": True})
    inner = Regression()
    model, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=0.1))
    assert accelerator.rannc_figures() == {}
    losses = []
    for batch in batches(4):
        loss = model(**batch)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert accelerator.rannc_figures().keys() >= {"predicted_step_ms", "step_ms", "samples_per_s"}
    assert len(path.read_text().splitlines()) == 2, "the last step goes on, and the loss before it may be under way"
    accelerator.end_training()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-5)
    assert all(line["step_ms"] > 0 for line in lines)
    assert "step 1  loss " in capsys.readouterr().err


def test_a_log_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"log='.*' cannot be written"):
        RanncAccelerator(rannc={"log": str(tmp_path)}).prepare(Regression())


def test_fp16_skips_steps_that_overflow():
    """In the first steps the loss scale is too high: neither weights nor the learning rate change."""
    accelerator = RanncAccelerator(
        mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=2.0**22, growth_interval=2)]
    )
    inner = Regression()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model, optimizer, scheduler = accelerator.prepare(inner, optimizer, scheduler)
    assert model.compute_dtype == torch.float16
    (batch,) = batches(1)
    plain = Regression()
    nn.functional.mse_loss(plain(batch["inputs"])["outputs"], batch["targets"]).backward()
    exact = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
    record = []
    for _ in range(12):
        with accelerator.autocast():
            loss = model(**batch)["loss"]
        assert loss.dtype == torch.float32
        before, rate, scale = inner.first.weight.clone(), scheduler.get_last_lr()[0], accelerator.scaler.get_scale()
        accelerator.backward(loss)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        skipped = accelerator.optimizer_step_was_skipped
        if not skipped and True not in record:
            assert norm.item() == pytest.approx(exact.item(), rel=1e-2), (
                "gradients are unscaled before they are clipped"
            )
        assert norm.isfinite() != skipped
        assert torch.equal(inner.first.weight, before) == skipped
        assert scheduler.get_last_lr()[0] == (rate if skipped else rate / 2)
        after = accelerator.scaler.get_scale()
        assert after == scale / 2 if skipped else after in (scale, 2 * scale)
        record.append(not skipped)
    assert record[:2] == [False, False] and record.count(True) >= 3


def test_saving(tmp_path):
    accelerator = RanncAccelerator()
    inner = Regression()
    before = {name: value.clone() for name, value in inner.state_dict().items()}
    model = accelerator.prepare(inner)
    assert accelerator.unwrap_model(model) is inner
    for folder, step in (("untrained", 0), ("trained", 1)):
        for batch in batches(step):
            accelerator.backward(model(**batch)["loss"])
        for given in (model, inner):
            accelerator.save_model(given, tmp_path / folder)
            for name, value in load_file(tmp_path / folder / "model.safetensors").items():
                assert torch.equal(value, before[name])
    with pytest.raises(RuntimeError, match=r"state = accelerator.get_state_dict\(model\)"):
        inner.state_dict()


def test_models_without_trainable_parameters_stay_whole():
    accelerator = RanncAccelerator()
    teacher = nn.Linear(4, 4).requires_grad_(False)
    model, prepared = accelerator.prepare(Regression(), teacher)
    assert isinstance(model, RanncModel) and prepared is teacher
    assert prepared(torch.ones(1, 4)).shape == (1, 4)
    assert accelerator.get_state_dict(teacher).keys() == {"weight", "bias"}


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "Adafactor", "RMSprop", "Adagrad"])
def test_optimizers_accept_owning_nothing(kind):
    RanncAccelerator()
    model = Regression()
    parameters = list(model.parameters())
    inner = getattr(torch.optim, kind)([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 1.0}], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, 0.5)
    optimizer = AcceleratedOptimizer(inner)
    owned = OptimizerMap(dict(model.named_parameters()))
    owned.register(inner)
    owned.partition([])
    assert [group["params"] for group in inner.param_groups] == [[], []]
    for _ in range(2):
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert scheduler.get_last_lr() == [0.125, 0.25]
    optimizer.load_state_dict(optimizer.state_dict())
