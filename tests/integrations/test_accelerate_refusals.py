"""What RanncAccelerator refuses, when, and what it tells the user to do instead."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    TorchDynamoPlugin,
)
from accelerate.utils.deepspeed import DummyOptim, DummyScheduler
from torch import nn

from rannc_hf import RanncAccelerator, RanncConfig, RanncModel
from rannc_hf.integrations import accelerate as door
from rannc_hf.integrations.refusals import unsupported_processes

pytestmark = pytest.mark.usefixtures("environment")


@pytest.mark.parametrize(
    "arguments, environ, reason",
    [
        ({"fsdp_plugin": object()}, {}, "FSDP is another way.*`fsdp_plugin`.*MULTI_GPU"),
        ({"deepspeed_plugin": object()}, {}, "DeepSpeed is another way.*`deepspeed_plugin`"),
        ({"megatron_lm_plugin": object()}, {}, "Megatron-LM is another way"),
        ({"parallelism_config": object()}, {}, "ParallelismConfig is another way"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP is another way.*`ACCELERATE_USE_FSDP`"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is another way"),
        ({"mixed_precision": "fp8"}, {}, "fp8"),
        ({}, {"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8.*fp16"),
        ({"dynamo_backend": "inductor"}, {}, "torch.compile"),
        ({"dynamo_plugin": TorchDynamoPlugin(backend="inductor")}, {}, "torch.compile"),
        ({}, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "torch.compile"),
        ({"dataloader_config": DataLoaderConfiguration(even_batches=False)}, {}, "even_batches=False.*remove it"),
        (
            {"kwargs_handlers": [DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)]},
            {},
            "comm_hook=fp16.*remove it",
        ),
        ({"kwargs_handlers": [AutocastKwargs(enabled=False)]}, {}, "enabled=False"),
        ({"rannc": {"stagse": 2}}, {}, "unknown option `stagse`"),
    ],
)
def test_settings(environment, arguments, environ, reason):
    environment.update(environ)
    with pytest.raises(ValueError, match=reason):
        RanncAccelerator(**arguments)
    assert AcceleratorState._shared_state == {}, "accelerate was set up before the refusal"


def test_all_reasons_at_once_and_by_position(environment):
    environment["ACCELERATE_USE_FSDP"] = "true"
    with pytest.raises(ValueError) as error:
        RanncAccelerator(True, False, "fp8", dynamo_backend="inductor")
    assert str(error.value).count("\n  - ") == 3


def test_settings_that_make_no_difference_are_accepted(environment):
    environment["RANNC_CONFIG"] = '{"stages": 1}'
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True, static_graph=True)]
    accelerator = RanncAccelerator(mixed_precision="bf16", dynamo_backend="no", kwargs_handlers=handlers)
    assert isinstance(accelerator, Accelerator)
    assert accelerator.rannc == RanncConfig(stages=1)
    assert RanncAccelerator(rannc={"stages": 2}).rannc == RanncConfig(stages=2)


def test_processes_that_would_not_train_together(environment):
    environment["WORLD_SIZE"] = "2"
    del environment["ACCELERATE_USE_CPU"]
    cpu = torch.device("cpu")
    (reason,) = unsupported_processes("NO", cpu, environment)
    assert "2 processes were started" in reason and "ACCELERATE_USE_CPU=true" in reason
    assert "FSDP is not supported" in unsupported_processes("FSDP", cpu, environment)[0]
    assert "'xpu' is not supported" in unsupported_processes("MULTI_GPU", torch.device("xpu"), environment)[0]
    assert unsupported_processes("MULTI_CPU", cpu, environment) == []


def test_trainer():
    with pytest.raises(ValueError, match=r"transformers.Trainer.*RanncTrainer"):
        exec("RanncAccelerator()", {"__name__": "transformers.trainer", "RanncAccelerator": RanncAccelerator})


def test_processes_are_looked_at_when_made(monkeypatch):
    monkeypatch.setattr(door, "unsupported_processes", lambda *_: ["they are too few"])
    with pytest.raises(ValueError, match="they are too few"):
        RanncAccelerator()


def test_models():
    accelerator = RanncAccelerator()
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert accelerator.prepare(frozen) is frozen
    spread = nn.Linear(2, 2)
    spread.hf_device_map = {"a": 0, "b": 1}
    for model, reason in [(torch.compile(nn.Linear(2, 2)), "torch.compile"), (spread, "device_map")]:
        with pytest.raises(ValueError, match=reason):
            accelerator.prepare(model)
    inner = nn.Linear(2, 2)
    model = accelerator.prepare(inner)
    assert isinstance(model, RanncModel)
    assert accelerator.prepare(model) is model and accelerator.prepare(inner) is model
    with pytest.raises(ValueError, match="one at a time; freeze this one"):
        accelerator.prepare(nn.Linear(2, 2))
    accelerator.free_memory()
    assert accelerator.prepare(model) is model
    with pytest.raises(ValueError, match="one at a time"):
        accelerator.prepare(nn.Linear(2, 2))
    accelerator.free_memory()
    assert isinstance(accelerator.prepare(nn.Linear(2, 2)), RanncModel)


def test_what_stands_for_objects_of_others():
    accelerator = RanncAccelerator()
    parameters = list(nn.Linear(2, 2).parameters())
    optimizer = DummyOptim(parameters)
    for given, reason in [(optimizer, "`DummyOptim`.*DeepSpeed"), (DummyScheduler(optimizer), "`DummyScheduler`")]:
        with pytest.raises(ValueError, match=reason):
            accelerator.prepare(nn.Linear(2, 2), given)
    assert accelerator._models == []


@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_optimizers_that_look_at_all_parameters_at_once(first):
    class Custom(torch.optim.LBFGS):
        pass

    class Lomo(torch.optim.SGD):
        pass

    for kind, reason in [(Custom, "LBFGS draws one quantity"), (Lomo, "Lomo updates parameters within the backward")]:
        accelerator, model = RanncAccelerator(), nn.Linear(2, 2)
        objects = (model, kind(model.parameters(), lr=0.1))
        with pytest.raises(ValueError, match=reason):
            accelerator.prepare(*(objects if first == "model" else objects[::-1]))
    accelerator = RanncAccelerator()
    other = nn.Linear(2, 2)
    accelerator.prepare(nn.Linear(2, 2), torch.optim.LBFGS(other.parameters()))


def test_ways_around_the_schedule():
    accelerator = RanncAccelerator()
    model = accelerator.prepare(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"accelerator.accumulate"):
        accelerator.trigger_sync_in_backward(model)
    with pytest.raises(ValueError, match="join_uneven_inputs"):
        accelerator.join_uneven_inputs([model])


def test_clipping_a_part_of_the_model():
    accelerator = RanncAccelerator()
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = accelerator.prepare(inner)
    for clip in (accelerator.clip_grad_norm_, accelerator.clip_grad_value_):
        with pytest.raises(ValueError, match="all parameters"):
            clip(inner[0].parameters(), 1.0)
        with pytest.raises(RuntimeError, match="before the first batch"):
            clip(model.parameters(), 1.0)
