"""Kernels for GPUs, in Triton's language. Import only where Triton is installed."""

# ruff: noqa: ANN001
import triton
import triton.language as tl


@triton.jit
def multiply_unless_one(flat, factor, size, elements: tl.constexpr) -> None:
    """Multiply `size` numbers at `flat` by the one at `factor`, each program `elements` of them."""
    value = tl.load(factor)
    if value != 1.0:
        index = tl.program_id(0).to(tl.int64) * elements + tl.arange(0, elements)
        inside = index < size
        tl.store(flat + index, tl.load(flat + index, inside) * value, inside)
