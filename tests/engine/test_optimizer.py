"""Optimizers that were made before the partition."""

import pytest
import torch
from torch import nn

from rannc_hf.engine.optimizer import OptimizerMap


def test_states_made_with_the_optimizer_follow_the_parameter():
    kept, dropped = (nn.Parameter(torch.empty(3, device="meta")) for _ in range(2))
    optimizer = torch.optim.SGD([kept, dropped], lr=0.1)
    for parameter in (kept, dropped):
        optimizer.state[parameter] = {"sum": torch.ones(3), "step": torch.tensor(1.0), "count": 2}
    parameters = OptimizerMap({"kept": kept, "dropped": dropped})
    parameters.register(optimizer)
    parameters.partition({"kept"})
    assert list(optimizer.state) == optimizer.param_groups[0]["params"] == [kept]
    state = optimizer.state[kept]
    assert (state["sum"].device.type, state["step"].device.type, state["count"]) == ("meta", "cpu", 2)


def test_optimizers_that_look_at_all_parameters_are_for_one_rank():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.LBFGS([parameter])
    OptimizerMap({"p": parameter}).register(optimizer)
    with pytest.raises(ValueError, match=r"LBFGS takes its directions from all parameters.*AdamW"):
        OptimizerMap({"p": parameter}, ranks=2).register(optimizer)
