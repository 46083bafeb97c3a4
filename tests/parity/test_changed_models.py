"""What a script changes in the model between steps counts in the next one, as in plain training, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from tests.parity.harness import gradients_of, loss_of, on_ranks, planner, shards
from tests.parity.models import CASES

Change = Callable[[Any], object]
WIDE = torch.float64


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 6), nn.Dropout(0.0)
        self.scale = {"default": 1.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.drop(self.linear(x))) * self.scale["default"]


class Experts(Layer):
    """Its code runs as it is written."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kinds, result = x.argmax(-1), torch.zeros_like(x)
        for kind in kinds.unique().tolist():
            result[kinds == kind] = super().forward(x[kinds == kind])
        return result


class Net(nn.Module):
    def __init__(self, kind: type[Layer] = Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(kind() for _ in range(3))
        self.norm = nn.BatchNorm1d(6)
        self.temperature = torch.tensor(1.0, dtype=WIDE)
        self.config = SimpleNamespace(double=False)
        self.activation = torch.tanh
        self._private = 1
        self.double()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = layer(x)
        x = self.activation(self.norm(x)) / self.temperature * self._private
        x = x * 2 if self.config.double else x
        return {"loss": cross_entropy(x, labels), "logits": x}


def batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(8, 6, generator=generator, dtype=WIDE),
        "labels": torch.randint(6, (8,), generator=generator),
    }


def nothing(model: Any) -> None:
    pass


def doubled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def train(model: nn.Module, changes: Sequence[Change], ranks: int = 2) -> list[list[int]]:
    """Train one step after each change, and compare with plain training; how many graphs each rank had after each."""
    parts = [shards(batch(i), ranks) for i in range(len(changes))]
    plain = copy.deepcopy(model).train()
    wanted = []
    for i, change in enumerate(changes):
        change(plain)
        plain.zero_grad()
        loss = loss_of(plain(**batch(i)))
        loss.backward()
        wanted.append((loss.item(), {n: p.grad for n, p in plain.named_parameters()}))

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> list[int]:
        graphs = []
        for i, change in enumerate(changes):
            change(wrapped.module)
            optimizer.zero_grad()
            loss = loss_of(wrapped(**parts[i][rank]))
            loss.backward()
            assert loss.item() == pytest.approx(wanted[i][0], rel=1e-9)
            for name, gradient in gradients_of(wrapped).items():
                other = wanted[i][1][name]
                assert gradient is not None and other is not None
                torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-10)
            graphs.append(len(wrapped._runtimes))
        return graphs

    # One microbatch: batch normalisation is over the whole batch then.
    return on_ranks(model.train(), ranks, planner([1] * ranks, 1), run)


CHANGES: dict[str, tuple[Change, Change]] = {
    "a dropout's p": (lambda m: setattr(m.layers[1].drop, "p", 1.0), lambda m: setattr(m.layers[1].drop, "p", 0.0)),
    "an entry of a table": (
        lambda m: m.layers[0].scale.update(default=2.0),
        lambda m: m.layers[0].scale.update(default=1.0),
    ),
    "a part in evaluation mode": (lambda m: m.norm.eval(), lambda m: m.norm.train()),
    "momentum": (lambda m: setattr(m.norm, "momentum", 0.5), lambda m: setattr(m.norm, "momentum", 0.1)),
    "a config's flag": (lambda m: setattr(m.config, "double", True), lambda m: setattr(m.config, "double", False)),
    "a function": (lambda m: setattr(m, "activation", torch.sin), lambda m: setattr(m, "activation", torch.tanh)),
    "a private attribute": (lambda m: setattr(m, "_private", 3), lambda m: setattr(m, "_private", 1)),
    "a tensor written in place": (lambda m: m.temperature.fill_(2), lambda m: m.temperature.fill_(1)),
    "a hook": (
        lambda m: setattr(m, "handle", m.layers[1].linear.register_forward_hook(doubled)),
        lambda m: m.handle.remove(),
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_counts_and_going_back_takes_the_first_graph(what: str):
    there, back = CHANGES[what]
    assert train(Net(), [nothing, there, nothing, back]) == [[1, 2, 2, 2]] * 2


def test_another_tensor_is_another_state():
    def put(value: float) -> Change:
        return lambda m: setattr(m, "temperature", torch.tensor(value, dtype=WIDE))

    assert train(Net(), [nothing, lambda m: m.temperature.fill_(2), put(1.0)]) == [[1, 2, 3]] * 2


def test_code_that_runs_as_it_is_sees_changes():
    changes = [nothing, CHANGES["an entry of a table"][0], CHANGES["a hook"][0]]
    assert train(Net(Experts), changes) == [[1, 2, 3]] * 2


def test_a_hook_that_would_run_twice_is_refused():
    with pytest.raises(ValueError, match=r"module 'layers.1' has a forward hook \(doubled\).*run twice"):
        train(Net(Experts), [nothing, lambda m: m.layers[1].register_forward_hook(doubled)])


def test_few_graphs_are_kept_of_a_model_that_changes_at_every_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rannc_hf.engine.specialised._MOST_STATES", 2)
    changes: list[Change] = [lambda m, i=i: setattr(m, "_private", i) for i in (1, 2, 3, 4, 2, 1)]  # type: ignore[misc]
    assert train(Net(), changes) == [[1, 2, 3, 3, 3, 3]] * 2


def test_a_change_on_one_rank_is_an_error_on_all():
    parts = shards(batch(0), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        wrapped(**parts[rank])["loss"].backward()
        if rank == 1:
            wrapped.module.layers[0].drop.p = 0.5
        with pytest.raises(ValueError, match=r"not in the same state on ranks 0 and 1.*drop.p: 0.5 \(was 0.0\)"):
            wrapped(**parts[rank])
        wrapped.module.layers[0].drop.p = 0.0
        if rank == 1:
            wrapped.module.eval()
        with pytest.raises(ValueError, match="training mode on rank 0, evaluation mode on rank 1"):
            wrapped(**parts[rank])
        wrapped.train()
        wrapped(**parts[rank])["loss"].backward()

    on_ranks(Net(), 2, planner((1, 1), 1), run)


def replace_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def by_vector(model: Any) -> None:
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector, model.parameters())


REFUSED: dict[str, tuple[Change, str]] = {
    "freezing": (lambda m: m.layers[2].requires_grad_(False), "requires_grad of parameter 'layers.2.linear.weight'"),
    "another parameter": (
        lambda m: setattr(m.layers[2].linear, "bias", nn.Parameter(torch.zeros(6, dtype=WIDE))),
        "parameter 'layers.2.linear.bias' was replaced",
    ),
    "tying": (
        lambda m: setattr(m.layers[2].linear, "bias", m.layers[0].linear.bias),
        "parameter 'layers.2.linear.bias' was replaced or tied",
    ),
    "another module": (lambda m: setattr(m, "norm", nn.Identity()), "module 'norm' was replaced"),
    "one module more": (lambda m: m.layers.append(Layer()), "module 'layers.3' was added"),
    "one parameter less": (lambda m: setattr(m.layers[0].linear, "bias", None), "'layers.0.linear.bias' was removed"),
    "other memory": (replace_data, "parameter 'layers.0.linear.weight' was given other memory"),
    "other memory, by a vector": (by_vector, "parameter 'layers.0.linear.weight' was given other memory"),
    "another precision": (lambda m: m.float(), "parameter 'layers.0.linear.weight' was given other memory"),
    "a parameter's hook": (
        lambda m: m.layers[0].linear.weight.register_hook(lambda g: g * 2),
        "'layers.0.linear.weight' has a hook .`register_hook`., which would never run",
    ),
    "a parameter's late hook": (
        lambda m: m.layers[0].linear.weight.register_post_accumulate_grad_hook(lambda p: None),
        "'layers.0.linear.weight' has a hook .`register_post_accumulate_grad_hook`., which would never run",
    ),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_changed_is_refused_by_name(what: str, ranks: int):
    change, message = REFUSED[what]
    parts = shards(batch(0), ranks)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        wrapped(**parts[rank])["loss"].backward()
        optimizer.step()
        wrapped(**parts[rank])["loss"].backward()
        change(wrapped.module)
        with pytest.raises(ValueError, match=message):
            wrapped(**parts[rank])

    on_ranks(Net(), ranks, planner([1] * ranks, 1), run)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_parameters_hook_is_refused_at_the_first_batch(kind: str):
    parts = shards(batch(0), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        if rank == 1:
            handle = getattr(wrapped.module.layers[2].linear.weight, kind)(lambda g: None)
        with pytest.raises(ValueError, match=rf"rank 1: parameter 'layers.2.linear.weight' has a hook .`{kind}`"):
            wrapped(**parts[rank])
        if rank == 1:
            handle.remove()
        wrapped(**parts[rank])["loss"].backward()
        wrapped(**parts[rank])["loss"].backward()

    on_ranks(Net(), 2, planner((1, 1), 1), run)


def test_the_unwrapped_models_mode_decides():
    parts, net = shards(batch(0), 2), Net()

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        wrapped(**parts[rank])["loss"].backward()
        wrapped.module.eval()
        assert not wrapped.training
        mean = wrapped.module.norm.running_mean.clone()
        evaluated = wrapped(**parts[rank])["logits"]
        assert torch.equal(wrapped.module.norm.running_mean, mean)
        wrapped.train()
        assert wrapped.module.training and wrapped.training
        wrapped(**parts[rank])["loss"].backward()
        assert len(wrapped._runtimes) == 2
        wrapped.eval()
        assert not wrapped.module.training
        return evaluated, mean

    results = on_ranks(net.train(), 2, planner((1, 1), 1), run)
    net(**batch(0))
    net.eval()
    with torch.no_grad():
        for part, (evaluated, _) in zip(parts, results):
            torch.testing.assert_close(evaluated, net(**part)["logits"], rtol=1e-9, atol=1e-11)


def test_a_part_that_changes_in_evaluation_does_not_need_the_same_parameters_trained():
    parts = shards(batch(0), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        wrapped(**parts[rank])["loss"].backward()
        wrapped.module.eval().layers[0].requires_grad_(False)
        wrapped(**parts[rank])
        wrapped.module.train().layers[0].requires_grad_(True)
        wrapped(**parts[rank])["loss"].backward()
        assert len(wrapped._runtimes) == 2

    on_ranks(Net(), 2, planner((1, 1), 1), run)


class Caching(Net):
    """Remembers what it has seen, as rotary embeddings and models of images do."""

    longest, last = 0, None
    hooked = False

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.longest, self.last = self.longest + 1, x.detach()
        if not self.hooked:
            self.layers[0].register_forward_hook(lambda m, a, o: None)
            self.hooked = True
        return super().forward(x, labels)


@pytest.mark.parametrize("seen", [False, True])
def test_what_a_model_keeps_for_itself_is_no_change(seen: bool):
    parts, net = shards(batch(0), 2), Caching()
    if seen:
        net(**batch(1))

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        for calls in range(3):
            wrapped.train()
            wrapped(**parts[rank])["loss"].backward()
            wrapped.eval()
            with torch.no_grad():
                wrapped(**parts[rank])
            with wrapped.whole():
                for _ in range(calls + rank):
                    wrapped.module(**parts[rank])
                wrapped(**parts[rank])
            assert len(wrapped._runtimes) == 2 + (calls > 0)
            with wrapped.whole():
                # What the script does there is a change.
                wrapped.module._private = 2
                wrapped.module(**parts[rank])
                wrapped(**parts[rank])
            wrapped.module._private = 1

    on_ranks(net, 2, planner((1, 1), 1), run)


def test_generation_between_steps_captures_nothing_again():
    case = CASES["llama"]
    parts = shards(case.batch_as(4), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        for length in (3, 5, 4):
            wrapped.train()
            loss_of(wrapped(**parts[rank])).backward()
            wrapped.eval()
            with torch.no_grad():
                wrapped(**parts[rank])
            ids = parts[rank]["input_ids"][:, :length]
            wrapped.generate(input_ids=ids, max_new_tokens=length + rank, pad_token_id=0, do_sample=False)
            with wrapped.whole():
                wrapped.module.generate(input_ids=ids, max_new_tokens=2, pad_token_id=0, do_sample=False)
        assert len(wrapped._runtimes) == 2

    on_ranks(case.model(), 2, planner((1, 1), 2), run, RanncConfig(length_multiple=1))
