"""``x[mask] = value`` becomes a `where` just where all entries get the same value."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rannc_hf.capture.passes.masked_writes import write_by_where

INDEX_PUT = torch.ops.aten.index_put.default


class Writes(nn.Module):
    """Writes to the entries of a mask: a number, a row, rows of their own, or each entry's own value doubled."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if self.what == "number":
            value = rows.sum()
        elif self.what == "row":
            value = rows[0]
        elif self.what == "rows":
            value = rows
        else:
            value = 2 * x[mask]
        return x.index_put((mask,), value)


@pytest.mark.parametrize(
    "what, rewritten", {"number": True, "row": True, "rows": False, "unknown many": False}.items(), ids=str
)
def test_what_is_rewritten(what: str, rewritten: bool):
    x, mask, rows = torch.randn(4, 3), torch.tensor([True, False, False, True]), torch.randn(2, 3)
    model = Writes(what)
    exported = torch.export.export(model, (x, mask, rows), strict=False).run_decompositions({})
    mode = next(node.meta["val"].fake_mode for node in exported.graph.nodes if "val" in node.meta)

    write_by_where(exported.graph, mode)
    exported.graph_module.recompile()

    assert (not exported.graph.find_nodes(op="call_function", target=INDEX_PUT)) == rewritten
    (out,) = exported.graph_module(x, mask, rows)
    torch.testing.assert_close(out, model(x, mask, rows), rtol=0, atol=0)
