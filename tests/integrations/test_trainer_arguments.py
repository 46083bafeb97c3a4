"""Arguments of the trainers: how options are given, what is refused before any work, and what takes Trainer's place."""

import json
import re
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import HfArgumentParser, Seq2SeqTrainer, Trainer

import rannc_hf.integrations.trainer as door
from rannc_hf import (
    RanncSeq2SeqTrainer,
    RanncSeq2SeqTrainingArguments,
    RanncTrainer,
    RanncTrainingArguments,
)
from rannc_hf.config import RanncConfig
from rannc_hf.integrations.trainer_refusals import OPTIMIZERS, unsupported_arguments
from tests.integrations.trainers import Regression, make, points

pytestmark = pytest.mark.usefixtures("environment")

ARGUMENTS = [RanncTrainingArguments, RanncSeq2SeqTrainingArguments]


@pytest.mark.parametrize("cls", ARGUMENTS)
def test_options_on_the_command_line(tmp_path, cls):
    file = tmp_path / "options.yaml"
    file.write_text("stages: 2\n")
    parser = HfArgumentParser(cls)
    for given, stages in [("auto", "auto"), (str(file), 2), ('{"stages": 2}', 2)]:
        (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--rannc", given])
        assert RanncConfig.load(args.rannc).stages == stages
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert args.rannc is None
    with pytest.raises(ValueError, match="unknown option `stagse`"):
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--rannc", '{"stagse": 2}'])


@pytest.mark.parametrize("cls", ARGUMENTS)
def test_arguments_are_saved_and_written_as_json(tmp_path, cls):
    args = cls(output_dir=str(tmp_path), rannc=RanncConfig(stages=2))
    torch.save(args, tmp_path / "training_args.bin")
    again = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert type(again) is cls and again.rannc == args.rannc
    assert json.loads(args.to_json_string())["rannc"]["stages"] == 2


def test_options_come_from_one_place(tmp_path, environment):
    environment["RANNC_CONFIG"] = '{"stages": 1}'
    assert make(RanncTrainer, tmp_path, Regression(), points(4)).accelerator.rannc.stages == 1
    with pytest.raises(ValueError, match=r"from the arguments of Trainer .* and from RANNC_CONFIG"):
        make(RanncTrainer, tmp_path, Regression(), points(4), rannc="auto")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"optim": "lomo"}, "`optim=lomo` steps while the backward runs.*adamw_torch_fused"),
        ({"optim": "galore_adamw"}, "`optim=galore_adamw` was not made to work.*use one of"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size.*per_device_train_batch_size"),
        ({"torch_compile": True}, "torch_compile.*remove it"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"save_on_each_node": True}, "save_on_each_node.*file system"),
        ({"debug": "underflow_overflow"}, "`debug`"),
        ({"bf16_full_eval": True, "use_cpu": True}, "bf16_full_eval.*`bf16`"),
        ({"gradient_checkpointing": True, "rannc": {"recompute": "none"}}, "contradicts `recompute: none`"),
        ({"gradient_checkpointing": True, "rannc": {"plan": "plan.json"}}, "cannot change a given plan"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches=False"),
    ],
)
def test_refused_before_any_work(tmp_path, monkeypatch, options, reason):
    monkeypatch.setattr(Trainer, "_move_model_to_device", None)
    with pytest.raises(ValueError, match=reason):
        make(RanncTrainer, tmp_path, Regression(), points(4), **options)


class Given:
    """Arguments that cannot be made on this machine."""

    optim, n_gpu, world_size, average_tokens_across_devices = "adamw_torch", 0, 1, True

    def __init__(self, **options):
        vars(self).update(options)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"fsdp": "full_shard"}, "`fsdp` is another way.*accelerate launch"),
        ({"deepspeed": "ds.json"}, "`deepspeed` is another way"),
        ({"parallelism_config": object()}, "`parallelism_config` is another way"),
        ({"n_gpu": 2}, "one process sees 2 GPUs.*one process per GPU"),
        ({"world_size": 2, "average_tokens_across_devices": False}, "average_tokens_across_devices=False"),
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}}, "`offload`"),
    ],
)
def test_reasons(options, reason):
    (found,) = unsupported_arguments(Given(**options), RanncConfig())
    assert re.search(reason, found)


def test_all_reasons_at_once():
    assert len(unsupported_arguments(Given(fsdp="x", optim="adalomo", torch_compile=True), RanncConfig())) == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_served_optimizers(name):
    assert unsupported_arguments(Given(optim=name), RanncConfig()) == []


def test_checkpointing_of_activations_becomes_recomputation(tmp_path):
    trainer = make(RanncTrainer, tmp_path, Regression(), points(4), gradient_checkpointing=True, max_steps=1)
    assert trainer.accelerator.rannc.recompute == "blocks"
    trainer.train()
    assert [stage.recompute for stage in trainer.model_wrapped.plan.stages] == ["blocks"]


def test_plain_trainer_is_told_what_to_use(tmp_path, monkeypatch):
    import transformers.trainer

    monkeypatch.setattr(transformers.trainer, "Accelerator", door.RanncAccelerator)
    with pytest.raises(ValueError, match=r"use rannc_hf\.RanncTrainer"):
        make(Trainer, tmp_path, Regression(), points(4))
    AcceleratorState._reset_state(reset_partial_state=True)


SCRIPTS = {
    "neither": "import accelerate, transformers",
    "both": "from transformers import Trainer, Seq2SeqTrainer",
    "trainer": "from transformers.trainer import Trainer; from transformers import Seq2SeqTrainer",
    "seq2seq": "from transformers.trainer_seq2seq import Seq2SeqTrainer; from transformers.trainer import Trainer",
}
CHECK = """
import sys, accelerate, transformers
assert (Trainer.__name__, Seq2SeqTrainer.__name__) == ("RanncTrainer", "RanncSeq2SeqTrainer")
assert transformers.Trainer is transformers.trainer.Trainer is Trainer
assert sys.modules["transformers.trainer"].__spec__.origin.endswith("trainer.py")
assert accelerate.Accelerator.__name__ == "RanncAccelerator"
"""


@pytest.mark.parametrize("imports", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_scripts_see_our_trainers(tmp_path, imports):
    check = CHECK if "Trainer" in imports else "import sys; assert 'transformers.trainer' not in sys.modules"
    (tmp_path / "script.py").write_text(f"{imports}\n{check}")
    command = [sys.executable, "-m", "rannc_hf.run", tmp_path / "script.py"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_our_classes_are_trainers():
    assert issubclass(RanncTrainer, Trainer) and issubclass(RanncSeq2SeqTrainer, (RanncTrainer, Seq2SeqTrainer))
