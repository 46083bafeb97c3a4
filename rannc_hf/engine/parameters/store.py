"""Parameters a rank holds, in buckets: placed at the partition, with the norm and scale of all their gradients."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn

from rannc_hf.capture.graph import Graph
from rannc_hf.engine.deferred import digest, is_deferred
from rannc_hf.engine.parameters.buckets import Bucket, empty
from rannc_hf.engine.parameters.gathering import StageParameters
from rannc_hf.engine.parameters.reduction import GradientReducer
from rannc_hf.engine.parameters.sharding import BucketSpec, bucket_specs
from rannc_hf.engine.transport import Transport
from rannc_hf.partition.plan import Plan


class ParameterStore:
    """All buckets of one rank. Making one is collective."""

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        plan: Plan,
        transport: Transport,
        device: torch.device,
        compute_dtype: torch.dtype | None,
    ) -> None:
        self.transport, self.device, self.compute_dtype = transport, device, compute_dtype
        self.originals = dict(model.named_parameters())
        self._agree_on_deferred()
        self.specs = specs = bucket_specs(graph, plan)
        self.owner_ranks = {name: spec.owners for spec in specs for name in spec.parameters}
        """The ranks that keep each parameter's master."""
        self.reduce_groups = sorted({spec.ranks for spec in specs if spec.trainable and len(spec.ranks) > 1})
        """Rank sets that reduce gradients, equal on every rank."""
        self.buckets: list[Bucket] = []
        for spec in specs:
            self._place(spec, compute_dtype)
        self._reducer = GradientReducer(self.buckets, transport)
        self.compute = StageParameters(self.buckets, transport, self._reducer)
        """The copies that this rank's stage computes with."""
        self.lent = False
        """Whether the user's parameters stand for the whole model, for a while, and not for masters."""

    def _place(self, spec: BucketSpec, compute_dtype: torch.dtype | None) -> None:
        """Agree on the first rank's values, keep them where this rank holds them, free them where it does not.

        Deferred ones are equal anyway, and only their owners ever compute them.
        """
        parameters = {key: self.originals[key] for key in spec.parameters}
        for key, parameter in parameters.items():
            if self.transport.world_size == 1 or is_deferred(parameter):
                continue
            value = parameter.data.to(self.device).contiguous()
            self.transport.broadcast(value, 0, self.transport.everyone, f"first value of parameter {key}").wait()
            parameter.data = value
        if self.transport.rank in spec.ranks:
            self.buckets.append(Bucket(spec, parameters, self.transport.rank, self.device, compute_dtype))
            return
        for parameter in parameters.values():
            empty(parameter, self.device)

    def _agree_on_deferred(self) -> None:
        """Make sure that all ranks would compute the same values."""
        found = self.transport.all_gather_object(digest(self.originals), "how parameters get their first values")
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ValueError(
                    f"ranks 0 and {rank} would start from different parameters: where a model is built under "
                    "deferred_init, all processes must build it alike and set the same seed before "
                    "(`accelerate.utils.set_seed(seed)`, without device_specific)"
                )

    @property
    def owned(self) -> dict[str, nn.Parameter]:
        """The user's parameters whose masters this rank keeps, by name.

        Raises:
            RuntimeError: inside `RanncModel.whole()`, where they are not masters.
        """
        if self.lent:
            raise RuntimeError(
                "inside `with model.whole():` nothing is trained, saved or loaded: do it after the block"
            )
        return {key: p for bucket in self.buckets for key, p in bucket.parameters.items()}

    def counted(self) -> list[nn.Parameter]:
        """Parameters that this rank accounts for when something is summed over all ranks: each exactly once."""
        rank = self.transport.rank
        return [p for bucket in self.buckets if bucket.spec.owners[0] == rank for p in bucket.parameters.values()]

    # -- one step ------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring compute copies up to date with the masters, before the forwards of a step. Collective.

        It is done in every step, also where no optimizer has stepped since: fused optimizers and writes through
        `parameter.data` move no version counter, so that there is no telling whether a master has changed.
        """
        self.compute.refresh()

    def begin_step(self) -> None:
        """Before the first microbatch."""
        self._reducer.begin_step()
        for bucket in self.buckets:
            bucket.begin()

    def begin_last_backward(self, parameters: frozenset[str]) -> None:
        """Before the last backward of a stage, which holds `parameters`: buckets may be reduced as they complete."""
        self._reducer.begin_last_backward(parameters)

    def finish_reduce(self) -> None:
        """Reduce what has not been reduced yet, and wait for all reductions."""
        self._reducer.finish()

    def publish(self, scale: torch.Tensor, only: Collection[str], conditional: Collection[str] = ()) -> None:
        """Hand this step's gradients, times `scale`, to the user's parameters in `only`.

        Of those in `conditional`, to the ones that the step has reached.
        """
        for bucket in self.buckets:
            bucket.publish(scale, only, conditional)

    @torch.no_grad()
    def norm(self, norm_type: float) -> torch.Tensor:
        """Norm of all gradients over all stages; tied and replicated parameters count once. Collective."""
        gradients = [p.grad for p in self.counted() if p.grad is not None]
        infinite = math.isinf(norm_type)
        if gradients:
            norms = torch.stack([n.to(torch.float64) for n in torch._foreach_norm(gradients, norm_type)])
            local = norms.max() if infinite else norms.pow(norm_type).sum()
        else:
            local = torch.zeros((), dtype=torch.float64, device=self.device)
        operation = "max" if infinite else "sum"
        self.transport.all_reduce(local, self.transport.everyone, "norm of the gradients", operation).wait()
        total = local if infinite else local.pow(1.0 / norm_type)
        return total.to(torch.float64 if self._wide() else torch.float32)

    def _wide(self) -> bool:
        return any(p.dtype == torch.float64 for p in self.originals.values())

    def scale_gradients(self, factor: torch.Tensor) -> None:
        """Multiply all gradients this rank holds by a scalar tensor."""
        gradients = [p.grad for p in self.owned.values() if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
