"""`Bucket`: parameters that live and travel together, in flat storage: masters, compute copies and gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from rannc_hf.engine.deferred import become, value_of
from rannc_hf.engine.parameters.scaling import multiply
from rannc_hf.engine.parameters.sharding import BucketSpec
from rannc_hf.partition.memory import ALIGNMENT


class Bucket:
    """What one rank keeps of a bucket.

    The user's Parameters become views of the flat `master` where this rank owns them, so an optimizer made before the
    partition keeps working; elsewhere they are emptied. Blocks compute with the leaves of `compute`, views of
    `flat_compute`: the masters themselves where they are owned and computed with in their own precision.

    Args:
        parameters: the user's, on `device` and with their values on every rank; or deferred, which get their values
            here, where they are owned.
        rank: this rank, one of `spec.ranks`.
        compute_dtype: the dtype to compute floating parameters in; None for their own.
    """

    def __init__(
        self,
        spec: BucketSpec,
        parameters: Mapping[str, nn.Parameter],
        rank: int,
        device: torch.device,
        compute_dtype: torch.dtype | None,
    ) -> None:
        self.spec, self.name, self.ranks, self.device = spec, spec.name, spec.ranks, device
        self.owned = rank in spec.owners
        self.parameters = dict(parameters) if self.owned else {}
        self.dtype = next(iter(parameters.values())).dtype
        self.spans, self.size = layout(parameters)
        self.shapes = {key: p.shape for key, p in parameters.items()}
        kind = computed_in(self.dtype, compute_dtype)
        self.master = self._take(parameters)
        self.flat_compute = (
            self.master
            if kind == self.dtype and self.master is not None
            else torch.empty(self.size, dtype=kind, device=device)
        )
        self.compute = {key: self._leaf(key) for key in self.spans}
        if spec.gathered and not self.owned:
            free(self.flat_compute)
        self.gradient: torch.Tensor | None = None
        """Sum of the gradients of a step."""
        self._streamed: torch.Tensor | None = None
        """Gradients of one backward of a block, on their way to the owner."""
        self._sums: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None

    def view(self, flat: torch.Tensor, key: str) -> torch.Tensor:
        """The part of a flat tensor that belongs to parameter `key`, in its shape."""
        start, stop = self.spans[key]
        return flat[start:stop].view(self.shapes[key])

    def _take(self, parameters: Mapping[str, nn.Parameter]) -> torch.Tensor | None:
        if not self.owned:
            for parameter in parameters.values():
                empty(parameter, self.device)
            return None
        master = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for key, parameter in parameters.items():
            view = self.view(master, key)
            view.copy_(value_of(parameter))
            become(parameter, view)
        return master

    def _leaf(self, key: str) -> torch.Tensor:
        # `.data`: the compute leaf must not share the version counter of what the optimizer or a transfer changes.
        return self.view(self.flat_compute, key).data

    @torch.no_grad()
    def cast(self) -> None:
        """Bring the compute copy up to date with the masters, on their owner."""
        if self.master is not None and self.flat_compute is not self.master:
            self.flat_compute.copy_(self.master)

    # -- gradients -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make a zeroed sum of gradients for one step, apart from gradients that were published and not cleared."""
        if not self.spec.trainable:
            return
        # A step that failed may have left some.
        self._streamed = None
        if self.spec.streamed and not self.owned:
            return
        # A buffer that a user's `.grad` is a view of (it was published, and not cleared) is the user's now.
        memory = {p.grad.untyped_storage().data_ptr() for p in self.parameters.values() if p.grad is not None}
        if self.gradient is not None and self.gradient.untyped_storage().data_ptr() in memory:
            self.gradient = None
        if self.gradient is None:
            self.gradient = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        else:
            self.gradient.zero_()

    def sum(self, key: str) -> torch.Tensor | None:
        """Where the gradients of parameter `key` are added; None where it is not trained."""
        if not self.spec.trainable:
            return None
        if self.spec.streamed:
            if self._streamed is None:
                self._streamed = torch.zeros(self.size, dtype=self.dtype, device=self.device)
            return self.view(self._streamed, key)
        assert self.gradient is not None, self.name
        if self._sums is None or self._sums[0] is not self.gradient:
            self._sums = self.gradient, {key: self.view(self.gradient, key) for key in self.spans}
        return self._sums[1][key]

    def collect(self) -> torch.Tensor:
        """Take what a backward has added to a streamed bucket: a flat tensor."""
        found, self._streamed = self._streamed, None
        return found if found is not None else torch.zeros(self.size, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def publish(self, scale: torch.Tensor, only: Collection[str], conditional: Collection[str] = ()) -> None:
        """Set (or add to) `.grad` of the user's parameters: the gradient of this step times `scale`.

        Those that are not in `only` are left alone, and those in `conditional` that this step has not reached.
        """
        if not self.spec.trainable:
            return
        if self.owned:
            assert self.gradient is not None
            multiply(self.gradient, scale)
            for key, parameter in self.parameters.items():
                if key not in only:
                    continue
                view = self.view(self.gradient, key)
                if key in conditional and not bool(view.any()):
                    continue
                if parameter.grad is None:
                    parameter.grad = view
                else:
                    parameter.grad.add_(view)


def layout(parameters: Mapping[str, torch.Tensor]) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each parameter of a bucket begins and ends in its flat storage, and how many elements that has."""
    spans: dict[str, tuple[int, int]] = {}
    size = 0
    for key, parameter in parameters.items():
        spans[key] = (size, size + parameter.numel())
        size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    return spans, size


def computed_in(dtype: torch.dtype, compute_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that parameters of `dtype` are computed with."""
    return dtype if compute_dtype is None or not dtype.is_floating_point else compute_dtype


def empty(parameter: nn.Parameter, device: torch.device) -> None:
    """Free the memory of a parameter that another rank owns; its shape stays readable, scalars' too.

    Read by mistake it is NaN, which shows in whatever is made of it; a number would look like a weight.
    """
    value = float("nan") if parameter.dtype.is_floating_point or parameter.dtype.is_complex else 1
    one = torch.full([1] * parameter.dim(), value, dtype=parameter.dtype, device=device)
    become(parameter, one.expand(parameter.shape))


def free(flat: torch.Tensor) -> None:
    """Free the memory of a tensor and all its views, which stay valid for `refill`.

    Whoever still refers to them (autograd's saved tensors, transfers not yet known to be complete) keeps no memory
    alive. On CUDA this is in the order of the current stream, as for any tensor.
    """
    flat.untyped_storage().resize_(0)


def refill(flat: torch.Tensor) -> None:
    """Give a freed tensor, and so all its views, memory again, with undefined contents."""
    flat.untyped_storage().resize_(flat.numel() * flat.element_size())
