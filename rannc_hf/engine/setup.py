"""From a model and its first batch to a plan that all ranks agree on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from rannc_hf.capture import CaptureError, Graph, capture
from rannc_hf.capture.asked import tell_as_plain, told_as_plain
from rannc_hf.capture.numbers import check_numbers
from rannc_hf.capture.opaque.tell import told
from rannc_hf.capture.outputs import told_left_out
from rannc_hf.capture.watch import Losses
from rannc_hf.config import RanncConfig
from rannc_hf.engine.batch import GlobalBatch
from rannc_hf.engine.transport import Transport
from rannc_hf.engine.watched import refuse_hooks_of_regions
from rannc_hf.partition.plan import Plan, ranks_in_words
from rannc_hf.partition.schedules import SPLIT_SCHEDULE

T = TypeVar("T")
logger = logging.getLogger(__name__)
_told: set[str] = set()
"""What has been said: a model is captured again for other shapes."""

_NOTABLE = 1.02
"""Samples that are larger by this factor than those of the plan are worth a warning."""


def agree(transport: Transport, what: str, work: Callable[[], T], signature: Callable[[T], Any] = lambda _: None) -> T:
    """Do `work` on every rank; if it fails on any, or results differ by `signature`, fail alike on all. Collective.

    Raises:
        ValueError: with the first failing rank's message.
    """
    result: T | None = None
    try:
        result = work()
        outcome: tuple[bool, Any] = (True, signature(result))
    except Exception as error:
        # Whatever it is: the other ranks wait to hear of it.
        failure = error
        outcome = (False, message_of(error))
    outcomes = transport.all_gather_object(outcome, what)
    for rank, (good, detail) in enumerate(outcomes):
        if not good:
            if rank == transport.rank:
                raise failure
            raise ValueError(f"rank {rank}: {detail}")
        if detail != outcomes[0][1]:
            raise ValueError(
                f"{what}: ranks 0 and {rank} differ ({outcomes[0][1]} and {detail}); all ranks must build the same "
                "model and use the same config"
            )
    assert result is not None
    return result


def capture_agreed(
    transport: Transport,
    model: nn.Module,
    batch: GlobalBatch,
    dtype: torch.dtype | None,
    training: bool,
    loss: Losses,
) -> Graph:
    """Capture on every rank, and make sure that all have the same graph. Rank 0 says which modules run as they are.

    It also compares the graph with the model by numbers, for all: `check_numbers`. Where they differ the model is
    captured again as if it were not traced, now and ever after.

    Raises:
        CaptureError: where the model cannot be captured, or computes something else then too.
    """
    wrong: list[CaptureError] = []

    def make() -> Graph:
        graph = capture(model, batch.fields, dtype=dtype, training=training, loss=loss, folded=batch.folded)
        refuse_hooks_of_regions(graph, model)
        if transport.rank == 0:
            try:
                compared = check_numbers(graph, model, batch.fields, dtype, batch.folded)
            except CaptureError as error:
                if told_as_plain(model):
                    raise
                wrong.append(error)
            else:
                if wrong and not compared:
                    raise wrong[0]
        return graph

    def agreed() -> Graph:
        return agree(
            transport,
            "capture of the model",
            lambda: transport.once(make, "capture of the model"),
            lambda graph: (graph.structural_hash, [block.key for block in graph.blocks]),
        )

    graph = agreed()
    if transport.from_rank_0(lambda: bool(wrong), "whether the graph computes what the model does"):
        tell_as_plain(model)
        try:
            graph = agreed()
        except ValueError as error:
            raise CaptureError("\n".join(dict.fromkeys(map(str, [*wrong, error])))) from error
    for line in [*told(graph), *told_left_out(graph)] if transport.rank == 0 else ():
        if line not in _told:
            _told.add(line)
            logger.warning("rannc: %s", line)
    return graph


def check_trained(graph: Graph, planned: Graph, plan: Plan, rank: int) -> None:
    """Check that `graph`, of a batch of other shapes or fields, can be trained by the plan for `planned`.

    Raises:
        ValueError: when it trains parameters that `planned` does not.
    """
    more = sorted(graph.gradient_parameters() - planned.gradient_parameters())
    if more:
        raise ValueError(
            f"this batch trains '{more[0]}' ({len(more)} such parameters), which the first batch did not, and for that "
            "one they were placed: begin with a batch whose outputs or loss use all parameters"
        )
    larger = _sample_bytes(graph) / max(1, _sample_bytes(planned))
    if larger > _NOTABLE and rank == 0:
        logger.warning(
            "rannc: samples of this batch are %.2f times as large as those that the plan was made for "
            "(longer, or of a model that was changed), and need so much more memory than it predicts: begin with the "
            "longest batch, or plan for it by "
            "`model.partition(**batch)`",
            larger,
        )
    if graph.split and not planned.split and plan.schedule != SPLIT_SCHEDULE and rank == 0:
        logger.warning(
            "rannc: the model returns no loss for this batch, so the loss is the script's: all forwards run before the "
            "backwards, which holds the activations of all microbatches, and the plan's schedule (%s) was chosen to "
            "hold fewer",
            plan.schedule,
        )


def _sample_bytes(graph: Graph) -> int:
    """Bytes of all values of a sample."""
    return sum(spec.bytes_at(1) for spec in graph.values.values() if spec.batch_dim is not None)


def plan_agreed(
    transport: Transport, graph: Graph, config: RanncConfig, batch_size: int, find: Callable[[Graph, int], Plan]
) -> Plan:
    """The plan that rank 0 finds, checked against the graph, on every rank. Collective.

    Raises:
        ValueError: on every rank, with rank 0's message.
    """

    def make() -> Plan:
        plan = find(graph, batch_size)
        plan.check(graph, transport.world_size)
        if plan.idle:
            logger.warning(
                "rannc: %s RUN NO STAGE of the plan (%s); with fewer processes the step would be as fast",
                ranks_in_words(plan.idle),
                plan.why or "which lists them in `idle`",
            )
        if config.plan_output is not None:
            plan.save(config.plan_output)
        return plan

    failure: Exception | None = None

    def outcome() -> tuple[Plan | None, str]:
        nonlocal failure
        try:
            return make(), ""
        except Exception as error:
            failure = error
            return None, message_of(error)

    # Measuring the costs of a large model may take longer than any other wait.
    plan, problem = transport.from_rank_0(
        outcome, "the plan, which rank 0 makes (it may measure costs of blocks first)"
    )
    if plan is None:
        raise ValueError(problem) from failure
    return plan


def message_of(error: Exception) -> str:
    """What the other ranks are told."""
    return str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"


def default_transport(config: RanncConfig, device: torch.device) -> Transport:
    """Between the processes of torch.distributed; where there are none, this one alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from rannc_hf.engine.transport.distributed import DistributedTransport

        return DistributedTransport(config.timeout_s, device)
    from rannc_hf.engine.transport.local import LocalWorld

    return LocalWorld(1, config.timeout_s).transports[0]
