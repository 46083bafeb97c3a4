"""The engine's figures as numbers by name, for trackers, callbacks and logs."""

from __future__ import annotations

import torch

from rannc_hf.capture.graph import Graph
from rannc_hf.cost.analytic import main_dtype
from rannc_hf.cost.devices import GIB
from rannc_hf.cost.ops import forward_flops
from rannc_hf.engine import RanncModel
from rannc_hf.engine.meter import MeasuredStep
from rannc_hf.engine.planning import cluster_here
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.timeline import timeline

_TRAINING = 3
"""A backward does twice the products of its forward: A. Chowdhery et al., "PaLM", 2022, appendix B, counts so too.
Recomputed forwards and unlabelled rows that were left out do not count: the figure tells of useful work."""


class Figures:
    """Figures of one model's training on this process; asking for them is not collective, and waits for nothing."""

    def __init__(self, model: RanncModel) -> None:
        self.model = model
        self._fixed: dict[str, float] | None = None
        self._flops_per_sample = 0.0
        self._peak_flops = 0.0

    def now(self) -> dict[str, float]:
        """What is known at this time; {} before the first batch.

        - `predicted_step_ms`, `predicted_bubble` (share of the step in which the busiest stage waits),
          `predicted_memory_gib` (of this process): from the plan, where it predicts them.
        - `step_ms` (median of recent steps), `samples_per_s`, `tokens_per_s`, `tflops_per_device`, `mfu` (share of the
          device's peak; GPUs alone) and `predicted_over_measured`: from the second steady training step on.
        - `peak_memory_gib` of this process's GPU.
        """
        if not self.model.partitioned:
            return {}
        if self._fixed is None:
            self._fixed = self._predicted()
        result = dict(self._fixed)
        step = self.model.meter.typical()
        if step is not None:
            result |= self.of(step)
            if "predicted_step_ms" in result:
                result["predicted_over_measured"] = result["predicted_step_ms"] / result["step_ms"]
        if self.model.device.type == "cuda":
            result["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.model.device) / GIB
        return result

    def of(self, step: MeasuredStep) -> dict[str, float]:
        """Time and rates of one step."""
        if self._fixed is None:
            self._fixed = self._predicted()
        seconds = max(step.seconds, 1e-9)
        rates = {"step_ms": seconds * 1e3, "samples_per_s": step.samples / seconds}
        if step.tokens:
            rates["tokens_per_s"] = step.tokens / seconds
        flops = self._flops_per_sample * step.samples / seconds / self.model.transport.world_size
        rates["tflops_per_device"] = flops / 1e12
        if self._peak_flops:
            rates["mfu"] = flops / self._peak_flops
        return rates

    def _predicted(self) -> dict[str, float]:
        plan, graph = self.model.plan, self.model.graph
        assert plan is not None and graph is not None
        cluster = self._cluster()
        self._flops_per_sample = training_flops(graph, 1)
        # What is given as a CPU's peak is a guess.
        if cluster is not None and not cluster.device.is_cpu:
            self._peak_flops = cluster.device.rate(main_dtype(graph))
        result = {}
        if plan.step_time_us > 0:
            result["predicted_step_ms"] = plan.step_time_us / 1e3
        if all(s.predicted_forward_us + s.predicted_backward_us > 0 for s in plan.stages):
            result["predicted_bubble"] = timeline(plan, graph, cluster).simulation.bubble
        # Every stage that a rank runs says what the whole rank needs.
        memory = max((s.predicted_memory_bytes for s in plan.stages if self.model.transport.rank in s.ranks), default=0)
        if memory > 0:
            result["predicted_memory_gib"] = memory / GIB
        return result

    def _cluster(self) -> Cluster | None:
        """The devices in use; None where nodes differ, for which plans are written by hand."""
        try:
            return cluster_here(self.model.transport.world_size, self.model.device)
        except ValueError:
            return None


def training_flops(graph: Graph, samples: int) -> float:
    """FLOPs of matrix products, convolutions and attention in a forward and a backward of `samples` samples."""
    return _TRAINING * sum(forward_flops(node, graph, samples) for node in graph.fx_graph.nodes)
