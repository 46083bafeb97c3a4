"""What the BERT recipe trains with: its phases, learning rates, LAMB, and the guard against divergence."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from divergence import MOST_SKIPPED, WINDOW, Diverged, DivergenceGuard
from lamb import Lamb
from optimizers import build_optimizer
from schedule import learning_rate
from settings import Recipe, TrainingSettings
from throughput import flops_per_sample, peak_tflops
from transformers import (
    BertConfig,
    BertForPreTraining,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from tests.checkpoint.runs import Tiny, batches
from tests.parity.harness import loss_of, on_ranks, planner, shards

DEMO = Path(__file__).parents[2] / "recipes" / "bert_pretraining" / "configs" / "demo.json"


def load(tmp_path, training, overrides=()):
    content = json.loads(DEMO.read_text())
    content["training"] = training
    (tmp_path / "config.json").write_text(json.dumps(content))
    return Recipe.load(tmp_path / "config.json", overrides)


def test_phases_differ_in_what_they_say(tmp_path):
    phases = [{"steps": 9, "warmup_steps": 2, "batch_size": 8}, {"sequence_length": 32, "steps": 3, "batch_size": 4}]
    recipe = load(tmp_path, {"learning_rate": 0.1, "decay": "cosine", "phases": phases, "seed": 3})
    first, second = recipe.phases()
    assert (first.data.sequence_length, first.training.batch_size, first.training.steps) == (64, 8, 9)
    assert (second.data.sequence_length, second.training.batch_size, second.training.steps) == (32, 4, 3)
    assert (first.training.warmup_steps, second.training.warmup_steps) == (2, 2)
    assert second.training.decay == "cosine" and second.training.seed == 3
    assert first.phases() == (first,)
    (alone,) = load(tmp_path, {"learning_rate": 0.1, "steps": 2, "batch_size": 4}).phases()
    assert alone.training.steps == 2


def test_wrong_phases_and_overrides_name_the_key(tmp_path):
    training = {"learning_rate": 0.1, "steps": 4, "batch_size": 4}
    with pytest.raises(ValueError, match="phase 1: unknown key seed"):
        load(tmp_path, {**training, "phases": [{"seed": 1}]})
    with pytest.raises(ValueError, match="phases: warmup_steps=2 must be below steps=1"):
        load(tmp_path, {**training, "warmup_steps": 2, "phases": [{}, {"steps": 1}]})
    with pytest.raises(ValueError, match="checkpoint_every=15 must be a multiple of log_every"):
        load(tmp_path, {**training, "checkpoint_every": 15})
    assert load(tmp_path, training, ["training.steps=7", "model.model_type=bert"]).training.steps == 7
    for wrong in ("steps=7", "training.steps", "none.steps=7"):
        with pytest.raises(ValueError, match="is not of the form SECTION"):
            load(tmp_path, training, [wrong])


@pytest.mark.parametrize(
    ("decay", "reference"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_learning_rates_are_those_of_transformers(decay, reference):
    settings = TrainingSettings(batch_size=1, steps=20, learning_rate=0.3, warmup_steps=4, decay=decay)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = reference(optimizer, 4, 20)
    for step in range(1, 21):
        assert learning_rate(settings, step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_other_learning_rates():
    options = {"batch_size": 1, "steps": 18, "learning_rate": 1.0, "warmup_steps": 2}
    root = TrainingSettings(**options, decay="polynomial")
    assert [learning_rate(root, step) for step in (1, 2, 3, 15)] == [0, 0.5, 1, 0.5]
    constant = TrainingSettings(**options, decay="constant")
    assert {learning_rate(constant, step) for step in range(3, 19)} == {1}


def lamb_by_the_formula(x, gradients, rate, beta1, beta2, epsilon, decay, adapt):
    """Algorithm 2 of You et al. 2020, written down once more: from the sums that the running means are."""
    for t in range(1, len(gradients) + 1):
        mean = sum((1 - beta1) * beta1 ** (t - 1 - i) * gradients[i] for i in range(t)) / (1 - beta1**t)
        square = sum((1 - beta2) * beta2 ** (t - 1 - i) * gradients[i] ** 2 for i in range(t)) / (1 - beta2**t)
        update = mean / (square.sqrt() + epsilon) + decay * x
        ratio = x.pow(2).sum().sqrt() / update.pow(2).sum().sqrt() if adapt and bool((x != 0).any()) else 1.0
        x = x - rate * ratio * update
    return x


def test_lamb_is_the_formula_of_its_paper():
    torch.manual_seed(0)
    starts = [torch.randn(7, 5).double(), torch.zeros(4).double(), torch.randn(3).double()]
    gradients = [[torch.randn_like(start) for start in starts] for _ in range(12)]
    parameters = [torch.nn.Parameter(start.clone()) for start in starts]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0, "adapt": False}]
    optimizer = Lamb(groups, lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1)
    for step in gradients:
        for parameter, gradient in zip(parameters, step):
            parameter.grad = gradient.clone()
        optimizer.step()
    for i, (start, parameter) in enumerate(zip(starts, parameters)):
        decay, adapt = (0.1, True) if i < 2 else (0.0, False)
        expected = lamb_by_the_formula(start, [step[i] for step in gradients], 0.02, 0.8, 0.95, 1e-4, decay, adapt)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shard", ["none", "optimizer", "parameters"])
def test_lamb_is_the_same_in_stages_and_shards(shard):
    def make(model):
        groups = [{"params": [p for p in model.parameters() if p.ndim == 2]}]
        groups.append({"params": [p for p in model.parameters() if p.ndim < 2], "adapt": False, "weight_decay": 0.0})
        return Lamb(groups, lr=0.05, weight_decay=0.1)

    plain, data = Tiny(), batches()
    optimizer = make(plain)
    for batch in data:
        loss_of(plain(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def body(model, optimizer, rank):
        for batch in data:
            loss_of(model(**shards(batch, 3)[rank])).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.full_state_dict()

    ours = on_ranks(Tiny(), 3, planner((1, 2), 2, "1f1b", "none", shard), body, make_optimizer=make)[0]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9)


def test_the_optimizer_of_a_recipe():
    model = torch.nn.Linear(2, 3)
    settings = TrainingSettings(
        batch_size=1, steps=1, learning_rate=0.5, optimizer="lamb", adam_beta2=0.9, epsilon=1e-5
    )
    matrices, vectors = build_optimizer(model, settings).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.01, 0)
    assert (matrices["adapt"], vectors["adapt"]) == (True, False)
    assert (matrices["lr"], matrices["betas"], matrices["eps"]) == (0.5, (0.9, 0.9), 1e-5)
    assert matrices["params"] == [model.weight] and vectors["params"] == [model.bias]


class Ranks:
    """Stands for the Accelerator of one rank, which gathers what it has and what another rank has."""

    def __init__(self, other, scaler=None):
        self.other, self.scaler = other, scaler

    def gather(self, own):
        return torch.cat([own, torch.tensor([next(self.other)])])


def judge(losses, action="skip", norms=None, state=None):
    """The reasons of a guard for each step, and the guard."""
    others = zip(losses, norms or [1.0] * len(losses))
    guard = DivergenceGuard(Ranks(iter(others)), action, deviations=6)
    if state is not None:
        guard.load_state_dict(state)
    reasons = []
    for step in range(1, len(losses) + 1):
        accepted = guard.accepts(step, torch.tensor(2.0), torch.tensor(1.0))
        assert accepted == (guard.reason is None)
        reasons.append(guard.reason)
    return reasons, guard


def test_what_is_not_finite_on_any_rank_is_left_out_on_all():
    reasons, _ = judge([2.0, math.nan, 2.0, math.inf, 2.0])
    assert reasons == [None, "the loss is nan", None, "the loss is inf", None]
    reasons, _ = judge([2.0] * 3, norms=[1.0, math.nan, math.inf])
    assert reasons[1:] == ["the norm of the gradients is nan", "the norm of the gradients is inf"]


def test_overflows_are_left_to_the_scaler_of_fp16():
    guard = DivergenceGuard(Ranks(iter([(2.0, math.inf), (math.nan, 1.0)]), scaler=object()), "skip", 6)
    assert guard.accepts(1, torch.tensor(2.0), torch.tensor(1.0))
    assert not guard.accepts(2, torch.tensor(2.0), torch.tensor(1.0))


def test_sudden_rises_are_told_from_noise_and_falls():
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(200, generator=generator) * 0.05).tolist()
    falling = [8 * 0.98**i + 2 + n for i, n in enumerate(noise)]
    assert not any(judge(falling)[0])
    with_rise = [*falling[:100], 9.0, *falling[100:]]
    reasons, _ = judge(with_rise)
    assert [i for i, reason in enumerate(reasons) if reason] == [100]
    assert "the loss rose to 5.5" in reasons[100]
    # Equal losses have no deviation: a little more is no sudden rise.
    assert not any(judge([2.0] * 60 + [2.3])[0])
    # Too few to compare with.
    assert not any(judge([2.0] * (WINDOW // 2 - 1) + [50.0])[0])


def test_stopping_is_one_step_late_and_never_after_a_checkpoint():
    guard = DivergenceGuard(Ranks(iter([(2.0, 1.0), (math.nan, 1.0), (2.0, 1.0)])), "stop", 6)
    assert guard.accepts(1, torch.tensor(2.0), torch.tensor(1.0))
    assert guard.accepts(2, torch.tensor(2.0), torch.tensor(1.0))
    with pytest.raises(Diverged, match="step 2: the loss is nan"):
        guard.accepts(3, torch.tensor(2.0), torch.tensor(1.0))
    guard = DivergenceGuard(Ranks(iter([(math.nan, 1.0)])), "stop", 6)
    guard.accepts(1, torch.tensor(2.0), torch.tensor(1.0))
    with pytest.raises(Diverged, match="step 1"):
        guard.settle()


def test_too_many_steps_left_out_in_a_row_end_the_run():
    with pytest.raises(Diverged, match=f"that was step {MOST_SKIPPED} in a row"):
        judge([2.0] + [math.nan] * MOST_SKIPPED)
    judge(([math.nan] * (MOST_SKIPPED - 1) + [2.0]) * 2)


def test_a_resumed_guard_decides_alike():
    losses = [2.0 + 0.01 * (i % 5) for i in range(40)] + [3.0, 2.0, 5.0]
    whole, _ = judge(losses)
    first, guard = judge(losses[:30])
    state = json.loads(json.dumps(guard.state_dict()))
    assert first + judge(losses[30:], state=state)[0] == whole
    assert whole[40] is not None and whole[42] is not None
    guard.begin_phase()
    assert guard.limit() == math.inf


def test_flops_are_those_of_the_products():
    config = BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, vocab_size=100
    )
    layers, hidden, length = 3, 32, 16
    per_token = 6 * (layers * 12 * hidden**2 + hidden**2 + hidden * 100) + 12 * layers * length * hidden
    ends = 6 * (hidden**2 + 2 * hidden)
    assert flops_per_sample(BertForPreTraining(config), length) == length * per_token + ends
    assert peak_tflops(torch.device("cpu")) is None
