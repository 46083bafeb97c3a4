"""`Plan`: which blocks run on which ranks, and how a batch flows through them.

A plan is a value: JSON in and out, edited by hand, hashed against the graph it was made for.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rannc_hf.capture.disk import replace_file
from rannc_hf.capture.graph import Graph
from rannc_hf.partition.fields import PlanFieldError, read_dataclass
from rannc_hf.partition.schedules import INTERLEAVED, SCHEDULES, SPLIT_SCHEDULE
from rannc_hf.partition.shards import SHARDS

RECOMPUTE = ("none", "blocks")
FORMAT = 1
"""Version of the JSON; a file of another version is refused."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Blocks `first_block` to `last_block` (inclusive) on `ranks`, one replica a rank.

    Under the schedule "interleaved" several stages have the same ranks (see `Plan.groups`).
    """

    first_block: int
    last_block: int
    ranks: tuple[int, ...]
    recompute: str = "none"
    """"none", or "blocks": keep only the inputs of each block and compute it again in the backward."""
    shard: str = "none"
    """What the replicas divide among them: "none", "optimizer", "gradients" or "parameters" (see `SHARDS`)."""
    predicted_forward_us: float = 0.0
    """Forward of one microbatch on the replica with the most samples, in microseconds."""
    predicted_backward_us: float = 0.0
    """Backward of one microbatch, with the recomputation where there is any, in microseconds."""
    predicted_memory_bytes: int = 0
    """Peak memory of each rank of the stage, with all stages that it runs."""
    predicted_again_us: float = 0.0
    """What of the backward is recomputation, in microseconds."""

    @property
    def replicas(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """A plan that lost, in short."""

    blocks: tuple[int, ...]
    """Number of blocks of each stage."""
    replicas: tuple[int, ...]
    microbatches: int
    schedule: str
    recompute: tuple[str, ...]
    step_time_us: float
    reason: str
    """Why it lost."""
    shard: tuple[str, ...] = ()
    """What the replicas of each stage divided."""
    placement: str = "consecutive"
    """"consecutive" ranks for each stage, or each stage "across" all nodes."""


@dataclass(frozen=True)
class Plan:
    """Stages in order, with the batch and the schedule they run."""

    stages: tuple[StagePlan, ...]
    batch_size: int
    """Samples of the global batch the plan was made for."""
    microbatches: int
    schedule: Literal["gpipe", "1f1b", "interleaved"] | str
    graph_hash: str
    step_time_us: float = 0.0
    """Predicted time of one optimizer step, in microseconds."""
    why: str = ""
    """Why this plan was chosen, for a person to read."""
    runners_up: tuple[RunnerUp, ...] = ()
    idle: tuple[int, ...] = ()
    """Ranks that run no stage. They pass their samples, and take part in what all ranks do, like the others."""

    @property
    def world_size(self) -> int:
        """Number of ranks, idle ones included."""
        return len({*self.idle, *(rank for s in self.stages for rank in s.ranks)})

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The stages of each group of ranks that run the same ones, in the order of their first.

        One each, but for "interleaved": there, stage k runs on the ranks of stage k modulo the number of groups.
        """
        found: dict[tuple[int, ...], list[int]] = {}
        for index, stage in enumerate(self.stages):
            found.setdefault(stage.ranks, []).append(index)
        return tuple(map(tuple, found.values()))

    def to_json(self) -> str:
        """JSON text, one line per stage and runner-up, that `from_json` reads back to an equal plan."""
        data: dict[str, Any] = {"format": FORMAT} | dataclasses.asdict(self)
        lines = []
        for key, value in data.items():
            if isinstance(value, (list, tuple)) and value:
                items = ",\n".join(f"    {json.dumps(item)}" for item in value)
                lines.append(f"  {json.dumps(key)}: [\n{items}\n  ]")
            else:
                lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan of a JSON text. Raises ValueError that names the field, e.g. `stages[1].ranks`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"plan is not valid JSON: {error}") from None
        if isinstance(data, dict):
            found = data.pop("format", None)
            if found != FORMAT:
                raise PlanFieldError("format", f"is {found!r}, but this version of rannc_hf reads format {FORMAT}")
        return read_dataclass(cls, data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; a reader never sees half of it."""
        replace_file(Path(path), lambda partial: partial.write_text(self.to_json(), encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan. Raises ValueError that names the file, and the field where one is wrong."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot read plan {os.fspath(path)!r}: {reason}") from None
        try:
            return cls.from_json(text)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None

    def check(self, graph: Graph, world_size: int) -> None:
        """Raise ValueError, naming the field, unless the plan can train `graph` on `world_size` ranks."""
        if self.graph_hash != graph.structural_hash:
            raise PlanFieldError(
                "graph_hash",
                f"is {self.graph_hash!r}, but the model, its batch or its precision give {graph.structural_hash!r}; "
                "make a new plan for this model (leave `plan` out of the config, or run `rannc plan`)",
            )
        self.check_shape(len(graph.blocks), world_size)
        if graph.split and self.schedule != SPLIT_SCHEDULE:
            raise PlanFieldError(
                "schedule",
                f"is {self.schedule!r}, but the script computes the loss from the outputs, so that all forwards run "
                f"before the backwards; make it {SPLIT_SCHEDULE!r}, which gives each stage ranks of its own and holds "
                "the activations of all microbatches",
            )

    def check_shape(self, blocks: int, world_size: int) -> None:
        """Raise ValueError, naming the field, unless the plan runs `blocks` blocks once each on `world_size` ranks."""
        if self.schedule not in SCHEDULES:
            raise PlanFieldError("schedule", f"is {self.schedule!r}, not one of {', '.join(SCHEDULES)}")
        if not self.stages:
            raise PlanFieldError("stages", "is empty; a plan has at least one stage")
        for index, stage in enumerate(self.stages):
            if stage.recompute not in RECOMPUTE:
                raise PlanFieldError(
                    f"stages[{index}].recompute", f"is {stage.recompute!r}, not one of {', '.join(RECOMPUTE)}"
                )
            if stage.shard not in SHARDS:
                raise PlanFieldError(f"stages[{index}].shard", f"is {stage.shard!r}, not one of {', '.join(SHARDS)}")
        self._check_blocks(blocks)
        self._check_ranks(world_size)
        self._check_microbatches()

    def _check_blocks(self, count: int) -> None:
        expected = 0
        for index, stage in enumerate(self.stages):
            if stage.first_block != expected:
                before = "the first block is 0" if index == 0 else f"stages[{index - 1}] ends with {expected - 1}"
                raise PlanFieldError(
                    f"stages[{index}].first_block",
                    f"is {stage.first_block}, but {before}: it must be {expected}, each block runs exactly once",
                )
            if not stage.first_block <= stage.last_block < count:
                raise PlanFieldError(
                    f"stages[{index}].last_block",
                    f"is {stage.last_block}, not between first_block {stage.first_block} and {count - 1}, "
                    f"the last block of the model",
                )
            expected = stage.last_block + 1
        if expected != count:
            raise PlanFieldError(
                f"stages[{len(self.stages) - 1}].last_block",
                f"is {expected - 1}, but the model's last block is {count - 1}: each block runs exactly once",
            )

    def _check_ranks(self, world_size: int) -> None:
        owner: dict[int, int] = {}
        groups = self._check_groups() if self.schedule == INTERLEAVED else len(self.stages)
        for index, stage in enumerate(self.stages[:groups]):
            name = f"stages[{index}].ranks"
            if not stage.ranks:
                raise PlanFieldError(name, "is empty; a stage has at least one rank")
            for rank in stage.ranks:
                if not 0 <= rank < world_size:
                    raise PlanFieldError(
                        name, f"has rank {rank}, but there are {world_size} processes (0 to {world_size - 1})"
                    )
                if rank in owner:
                    raise PlanFieldError(name, f"has rank {rank}, which stages[{owner[rank]}] has already")
                owner[rank] = index
        for index, rank in enumerate(self.idle):
            if not 0 <= rank < world_size:
                problem = f"is {rank}, but there are {world_size} processes (0 to {world_size - 1})"
            elif rank in owner:
                problem = f"is {rank}, which stages[{owner[rank]}] has"
            elif rank in self.idle[:index]:
                problem = f"is {rank}, which is in the list already"
            else:
                continue
            raise PlanFieldError(f"idle[{index}]", problem)
        missing = [r for r in range(world_size) if r not in owner and r not in self.idle]
        if missing:
            raise PlanFieldError(
                "stages[*].ranks",
                f"use {len(owner)} ranks, but there are {world_size} processes: no stage has {short_ranks(missing)}; "
                "give a stage more ranks, launch fewer processes, or list ranks that are to run nothing in `idle`",
            )

    def _check_groups(self) -> int:
        """The number of groups of an interleaved plan, of which stage after stage takes the next."""
        first = self.stages[0].ranks
        groups = next((k for k, s in enumerate(self.stages) if k > 0 and s.ranks == first), len(self.stages))
        if groups < 2 or len(self.stages) == groups:
            raise PlanFieldError(
                "stages[*].ranks",
                f"give {'each stage ranks of its own' if groups > 1 else 'neighbours the same ranks'}, but under the "
                'schedule "interleaved" the ranks of the first stages repeat in equal order (0, 1, 0, 1)',
            )
        for index, stage in enumerate(self.stages):
            if stage.ranks != self.stages[index % groups].ranks:
                raise PlanFieldError(
                    f"stages[{index}].ranks",
                    f'are {list(stage.ranks)}, but under the schedule "interleaved" the ranks repeat after '
                    f"{groups} stages: they must be those of stages[{index % groups}], "
                    f"{list(self.stages[index % groups].ranks)}",
                )
        if len(self.stages) % groups:
            raise PlanFieldError(
                "stages",
                f'are {len(self.stages)}, but under the schedule "interleaved" they are a multiple of the {groups} '
                "groups of ranks that take turns",
            )
        return groups

    def _check_microbatches(self) -> None:
        if not 1 <= self.microbatches <= self.batch_size:
            raise PlanFieldError(
                "microbatches", f"is {self.microbatches}, not between 1 and batch_size {self.batch_size}"
            )
        smallest = self.batch_size // self.microbatches
        for index, stage in enumerate(self.stages):
            if stage.replicas > smallest:
                raise PlanFieldError(
                    "microbatches",
                    f"is {self.microbatches}, which leaves {smallest} samples in a microbatch of batch_size "
                    f"{self.batch_size}, but stages[{index}] has {stage.replicas} replicas that each need one; "
                    f"use at most {max(1, self.batch_size // stage.replicas)}",
                )

    def __str__(self) -> str:
        rows = [("stage", "blocks", "ranks", "recompute", "shard", "forward", "backward", "memory")]
        for index, s in enumerate(self.stages):
            forward, backward = f"{s.predicted_forward_us / 1e3:.2f} ms", f"{s.predicted_backward_us / 1e3:.2f} ms"
            memory = f"{s.predicted_memory_bytes / 2**30:.2f} GiB"
            blocks = f"{s.first_block}..{s.last_block}"
            rows.append((str(index), blocks, short_ranks(s.ranks), s.recompute, s.shard, forward, backward, memory))
        widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        return "\n".join(
            [
                f"Plan({len(self.stages)} stages on {self.world_size} ranks, batch {self.batch_size} in "
                f"{self.microbatches} microbatches, {self.schedule}, predicted step {self.step_time_us / 1e3:.1f} ms)",
                *table,
                *([f"no stage runs on {ranks_in_words(self.idle)}"] if self.idle else []),
                *([self.why] if self.why else []),
            ]
        )


def ranks_in_words(ranks: Sequence[int]) -> str:
    """ "rank 3", or "ranks 4-7"."""
    return f"rank{'s' * (len(ranks) > 1)} {short_ranks(ranks)}"


def short_ranks(ranks: Sequence[int]) -> str:
    """Ranks with runs in short: "0-3", "0-1, 8-9", or "0, 2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
