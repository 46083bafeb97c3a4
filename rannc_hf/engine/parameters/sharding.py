"""Which parameters share a bucket, which ranks hold it, and which of them owns it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rannc_hf.capture.graph import Graph
from rannc_hf.engine.program import parameter_stages
from rannc_hf.partition.plan import Plan
from rannc_hf.partition.shards import owners, shardable


@dataclass(frozen=True)
class BucketSpec:
    """Parameters that live and travel together: of one block and dtype, with the same holders and owner."""

    name: str
    """For people: appears in errors of transfers."""
    parameters: tuple[str, ...]
    ranks: tuple[int, ...]
    """Ranks that compute with them, sorted."""
    owner: int | None
    """The rank of `ranks` that keeps their masters; None where each keeps its own (whole) ones."""
    shard: str
    """What `ranks` divide, one of `SHARDS`; "none" for whole ones."""
    trainable: bool
    """Whether the loss sends them a gradient."""
    tied: bool
    """Whether several stages hold them."""

    @property
    def streamed(self) -> bool:
        """Whether each microbatch's gradients go to the owner at once, who alone adds them up."""
        return self.shard in ("gradients", "parameters")

    @property
    def gathered(self) -> bool:
        """Whether the other ranks hold them only while a block uses them."""
        return self.shard == "parameters"

    @property
    def owners(self) -> tuple[int, ...]:
        """Ranks that keep masters."""
        return self.ranks if self.owner is None else (self.owner,)


def bucket_specs(graph: Graph, plan: Plan) -> list[BucketSpec]:
    """The buckets of all parameters, in one order for all ranks: that of their first use."""
    holders, live = parameter_stages(graph, plan), graph.gradient_parameters()
    owner_of = _owner_ranks(graph, plan)
    uses = Counter(name for block in graph.blocks for name in block.parameters)
    groups: dict[tuple[str, tuple[int, ...], int | None, torch.dtype, bool], list[str]] = {}
    for name, block in _places(graph).items():
        # What several blocks use is complete, and needed, at other times than the rest of its first block.
        place = name if uses[name] > 1 else block
        key = (place, holders[name], owner_of.get(name), graph.parameters[name].dtype, name in live)
        groups.setdefault(key, []).append(name)
    result = []
    for (place, stages, owner, dtype, trainable), names in groups.items():
        words = [str(dtype).removeprefix("torch."), *([] if trainable else ["no gradient"])]
        words += [] if owner is None else [f"owned by rank {owner}"]
        result.append(
            BucketSpec(
                name=f"{place} ({', '.join(words)})",
                parameters=tuple(names),
                ranks=tuple(sorted({r for s in stages for r in plan.stages[s].ranks})),
                owner=owner,
                shard="none" if owner is None else plan.stages[stages[0]].shard,
                trainable=trainable,
                tied=len(stages) > 1,
            )
        )
    assert sorted(n for spec in result for n in spec.parameters) == sorted(graph.parameters)
    return result


def _places(graph: Graph) -> dict[str, str]:
    """Each parameter's first block, in order of first use; unused ones come last."""
    result: dict[str, str] = {}
    for block in graph.blocks:
        for name in block.parameters:
            result.setdefault(name, f"block {block.index} {block.name}")
    return {**result, **{name: "unused parameters" for name in graph.parameters if name not in result}}


def _owner_ranks(graph: Graph, plan: Plan) -> Mapping[str, int]:
    """The rank that owns each parameter that a stage divides among its replicas."""
    result: dict[str, int] = {}
    for stage in plan.stages:
        if stage.shard != "none" and stage.replicas > 1:
            sizes = shardable(graph, stage.first_block, stage.last_block)
            result |= {name: stage.ranks[replica] for name, replica in owners(sizes, stage.replicas).items()}
    return result
