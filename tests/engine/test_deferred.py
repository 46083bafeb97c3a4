"""Models built without memory have, bit for bit, the parameters of a plain construction; alone and in the engine."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.engine.deferred import deferred_init, digest, is_deferred, materialize, value_of
from rannc_hf.engine.deferred.record import memory_of, needed
from rannc_hf.engine.transport import LocalWorld, Transport
from tests.parity.harness import CPU, EXACT_LENGTHS, SINGLE, compare, merge, optimizer_of, plain, planner, shards, train
from tests.parity.models import CASES

Build = Callable[[], nn.Module]
TINY = {
    "vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


class Odd(nn.Module):
    """Initialises its parameters in unusual ways."""

    def __init__(self) -> None:
        super().__init__()
        outside = nn.Parameter(torch.empty(40, 40))
        self.outside = outside
        nn.init.normal_(outside)  # through a name from before the registration
        self.orthogonal, self.sparse, self.truncated, self.tail = (nn.Parameter(torch.empty(12, 8)) for _ in range(4))
        nn.init.orthogonal_(self.orthogonal)
        nn.init.sparse_(self.sparse, 0.3)
        nn.init.trunc_normal_(self.truncated, std=0.7, a=-1, b=1)
        nn.init.trunc_normal_(self.tail, std=1.0, a=2, b=3)
        self.made = nn.Parameter(torch.randn(64, 64))
        self.ones = nn.Parameter(torch.ones(64, 64))
        self.computed = nn.Parameter(torch.linspace(0, 1, 5) ** 2 + torch.rand(5))
        self.rows = nn.Parameter(torch.empty(6, 4).uniform_())
        with torch.no_grad():
            self.rows[1].fill_(torch.randn(()).item())
            self.rows[:, 2].normal_()
            self.rows[torch.tensor([0, 3])] = torch.randn(2, 4)
            self.rows.mul_(2).clamp_(-1, 1)
        if (self.rows > 0.5).sum().item() > 3 and self.rows.device.type == "cpu":
            nn.init.constant_(self.ones, self.rows.max().item())
        self.brief = nn.Parameter(torch.rand(7, 3).to(torch.bfloat16))
        nn.init.normal_(self.brief)
        self.copied = nn.Parameter(self.made.data.clone().t())
        self.like = nn.Parameter(torch.rand_like(self.brief))
        base = torch.randn(2, 30)
        self.first, self.second = nn.Parameter(base[0]), nn.Parameter(base[1])
        own = torch.Generator().manual_seed(5)
        self.seeded = nn.Parameter(torch.empty(20))
        nn.init.uniform_(self.seeded, generator=own)
        self.register_buffer("start", self.made.detach() * 2)
        self.register_buffer("steps", torch.arange(5.0, device=self.made.device))
        self.gauss = nn.Parameter(torch.tensor([random.Random(0).gauss(0, 1) for _ in range(3)]))
        self.double()
        self.made.data = nn.functional.pad(self.made.data, (0, 1))


def bare_llama() -> nn.Module:
    return hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**TINY), dtype=torch.bfloat16)


MODELS: dict[str, Build] = {
    **{name: case.build for name, case in CASES.items()},
    "odd": Odd,
    "recurrent": lambda: nn.LSTM(8, 16, 2),
    "cloned layers": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2),
    "llama in bf16": bare_llama,
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TINY, num_key_value_heads=1, num_local_experts=4)),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2)),
    "swin": lambda: hf.SwinForImageClassification(
        hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    ),
    "resnet of transformers": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ),
}


def deferred(build: Build, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with deferred_init():
        return build()


@pytest.mark.parametrize("name", MODELS)
def test_values_equal_those_of_a_plain_construction(name: str):
    torch.manual_seed(0)
    plain_model = MODELS[name]()
    following = torch.rand(4)
    model = deferred(MODELS[name])
    assert torch.equal(torch.rand(4), following), "the random stream continues otherwise"
    assert all(is_deferred(p) for p in model.parameters())

    state = torch.get_rng_state()
    wanted = dict(plain_model.named_parameters())
    named = list(model.named_parameters())
    assert [n for n, _ in named] == list(wanted)
    random.Random(0).shuffle(named)
    for key, parameter in named:
        found = value_of(parameter)
        assert found.dtype == wanted[key].dtype and torch.equal(found, wanted[key]), key
    assert torch.equal(torch.get_rng_state(), state)
    buffers = dict(plain_model.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())

    before = dict(model.named_parameters())
    materialize(model)
    assert all(p is before[n] for n, p in model.named_parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, plain_model.state_dict()[key]), key


def test_what_is_overwritten_is_not_kept():
    with deferred_init():
        layer = nn.Linear(64, 64)
        for _ in range(3):
            nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.weight[0])
    memory = memory_of(layer.weight)
    assert memory is not None
    assert [op.function.__name__ for op in needed(memory)] == ["normal_.default", "zero_.default"]


def test_afterwards_dtypes_may_change_and_states_be_loaded():
    wanted = CASES["bert"].model()
    model = deferred(CASES["bert"].build).double()
    assert all(torch.equal(value_of(p), w) for p, w in zip(model.parameters(), wanted.parameters()))

    other = deferred(CASES["bert"].build, seed=1)
    assert digest(dict(other.named_parameters())) != digest(dict(model.named_parameters()))
    part = {k: v for k, v in wanted.state_dict().items() if "layer.0." in k}
    other.load_state_dict(part, strict=False)
    for name, parameter in other.named_parameters():
        assert is_deferred(parameter) == (name not in part)
        if name in part:
            assert torch.equal(parameter.double(), part[name].float().double())


def test_nothing_is_deferred_outside_of_it():
    with pytest.raises(KeyError), deferred_init():
        inside = nn.Linear(2, 2)
        raise KeyError
    assert is_deferred(inside.weight) and not nn.Linear(2, 2).weight.is_meta
    assert nn.init.trunc_normal_(torch.zeros(3)).abs().sum() > 0


def test_parameters_without_a_value_are_refused():
    with torch.device("meta"):
        model = CASES["resnet"].build()
    for use in (materialize, lambda m: RanncModel(m, RanncConfig(), device=CPU)):
        with pytest.raises(ValueError, match=r"'stem\.weight' and .* more are on the meta device.*deferred_init"):
            use(model)
    with deferred_init():
        unknown = nn.Parameter(torch.empty(2))
        holder = nn.ParameterList([unknown])
        with pytest.raises(ValueError, match="value of a tensor on the meta device"):
            holder[0].data.copy_(torch.empty(2, device="meta"))


def on_ranks(name: str, ranks: int, run: Callable[[RanncModel, Any, int], Any], **options: Any) -> list[Any]:
    """`run` on ranks that have each built the model deferred."""
    models = [deferred(CASES[name].build).train() for _ in range(ranks)]

    def body(transport: Transport) -> Any:
        model = models[transport.rank]
        optimizer = optimizer_of(model)
        wrapped = RanncModel(model, EXACT_LENGTHS, device=CPU, transport=transport, **options)
        wrapped.register_optimizer(optimizer)
        return run(wrapped, optimizer, transport.rank)

    return LocalWorld(ranks).run(body)


@pytest.mark.parametrize(
    ("name", "replicas", "shard"),
    [("t5", (1, 1), "none"), ("gpt2", (2, 1), "none"), ("bert", (2,), "optimizer"), ("vit", (2,), "parameters")],
    ids=str,
)
def test_training_equals_plain_training(name: str, replicas: tuple[int, ...], shard: str):
    case, ranks = CASES[name], sum(replicas)
    batch = case.batch_as(6, torch.float32)
    parts = shards(batch, ranks)
    make_plan = planner(replicas, 2, recompute="blocks" if shard == "parameters" else "none", shard=shard)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        result = train(wrapped, optimizer, parts[rank], 3)
        assert wrapped.store is not None
        for key, parameter in wrapped.module.named_parameters():
            assert not parameter.is_meta
            stored = parameter.untyped_storage().nbytes()
            assert key in wrapped.store.owned or stored <= parameter.element_size(), f"{key} takes memory"
        return result

    result = merge(on_ranks(name, ranks, run, planner=make_plan))
    compare(result, plain(case.model(torch.float32), batch, 3), SINGLE)


def test_states_and_evaluation_before_the_first_training_batch():
    case = CASES["t5"]
    wanted = case.model(torch.float32)
    parts = shards(case.batch_as(4, torch.float32), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        early = wrapped.full_state_dict()
        wrapped.eval()
        logits = wrapped(**parts[rank]).logits
        late = wrapped.full_state_dict()
        changed = {k: v + 1 for k, v in wanted.state_dict().items()}
        wrapped.load_full_state_dict(changed)
        return early, logits, late, wrapped.full_state_dict()

    results = on_ranks("t5", 2, run, planner=planner((1, 1), 2))
    for rank, (early, logits, late, changed) in enumerate(results):
        for state, offset in ((early, 0), (late, 0), (changed, 1)):
            assert state.keys() == (wanted.state_dict().keys() if rank == 0 else set())
            assert all(torch.equal(v, wanted.state_dict()[k] + offset) for k, v in state.items())
        torch.testing.assert_close(logits, copy.deepcopy(wanted).eval()(**parts[rank]).logits)


def test_a_state_loaded_before_the_partition_is_trained_from():
    case = CASES["resnet"]
    start = case.model(torch.float32)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.mul_(1.5)
    batch = case.batch_as(4, torch.float32)
    parts = shards(batch, 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        wrapped.load_full_state_dict(start.state_dict())
        return train(wrapped, optimizer, parts[rank], 2)

    result = merge(on_ranks("resnet", 2, run, planner=planner((1, 1), 2)))
    compare(result, plain(start, batch, 2), SINGLE)


def test_ranks_with_other_seeds_are_told():
    case = CASES["resnet"]
    models = [deferred(case.build, seed) for seed in (0, 1)]
    parts = shards(case.batch_as(4, torch.float32), 2)
    told = []

    def body(transport: Transport) -> None:
        wrapped = RanncModel(
            models[transport.rank], RanncConfig(), device=CPU, transport=transport, planner=planner((1, 1), 2)
        )
        try:
            wrapped(**parts[transport.rank])
        except ValueError as error:
            told.append(str(error))

    LocalWorld(2).run(body)
    assert len(told) == 2 and all("set the same seed" in message for message in told)
