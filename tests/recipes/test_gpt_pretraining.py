"""The GPT recipe: text to tokens, a launched run that is stopped and goes on, and plans for its models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

RECIPE = Path(__file__).parents[2] / "recipes" / "gpt_pretraining"
SENTENCES = [f"The {a} cat {v} the {b} dog." for a in ("old", "red") for v in ("saw", "met") for b in ("big", "wet")]


def load(name: str) -> ModuleType:
    """A program of the recipe, under a name that those of other recipes do not have."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"gpt_{name}", RECIPE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


data, plan_models = load("data"), load("plan_models")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt")
    lines = [json.dumps({"text": " ".join([*SENTENCES[i % 8 :], str(i)])}) for i in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    data.prepare([folder / "corpus.jsonl"], folder / "data", vocabulary=300, held_out=0.3)
    return folder / "data"


def test_every_document_is_once_in_one_part(prepared: Path) -> None:
    tokenizer = data.PreTrainedTokenizerFast.from_pretrained(prepared / "tokenizer")
    texts = []
    for split in data.SPLITS:
        tokens = np.fromfile(prepared / f"{split}.bin", dtype=np.uint16)
        assert tokens[-1] == tokenizer.eos_token_id
        parts = tokenizer.decode(tokens).split(data.END_OF_TEXT)
        assert len(parts) > 3
        texts += parts[:-1]
    assert sorted(texts) == sorted(" ".join([*SENTENCES[i % 8 :], str(i)]) for i in range(60))


def test_samples_are_consecutive_pieces(prepared: Path) -> None:
    blocks = data.TokenBlocks(prepared, "train", 16)
    tokens = np.fromfile(prepared / "train.bin", dtype=np.uint16)
    assert len(blocks) == len(tokens) // 16
    joined = np.concatenate([blocks[i]["input_ids"].numpy() for i in range(len(blocks))])
    assert (joined == tokens[: len(joined)]).all()
    assert (blocks[1]["labels"] == blocks[1]["input_ids"]).all()


def test_wrong_input_is_named(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing.train\.bin is missing; data\.py writes it"):
        data.TokenBlocks(tmp_path / "nothing", "train", 16)
    with pytest.raises(ValueError, match="less than one piece of 100000"):
        data.TokenBlocks(prepared, "held_out", 100000)
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: expected a JSON object with `text`"):
        list(data.documents([tmp_path / "bad.jsonl"]))
    with pytest.raises(ValueError, match=r"files are \.txt or \.jsonl"):
        list(data.documents([tmp_path / "page.html"]))
    with pytest.raises(ValueError, match="held_out=1 must be between 0 and 1"):
        data.prepare([], tmp_path, 300, held_out=1)


def test_a_launched_run_trains_and_goes_on_from_its_checkpoint(prepared: Path, tmp_path: Path) -> None:
    model = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": 300}
    (tmp_path / "model.json").write_text(json.dumps({**model, "bos_token_id": 0, "eos_token_id": 0}))
    options = json.loads((RECIPE / "demo.json").read_text())
    options |= {"model": "model.json", "data": str(prepared), "output_dir": "run", "max_steps": 4, "warmup_steps": 0}
    options |= {"save_steps": 2, "eval_strategy": "no", "logging_steps": 2, "learning_rate": 1e-2}
    (tmp_path / "options.json").write_text(json.dumps(options))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPE / "demo-rannc.yaml")]
    run = [str(RECIPE / "pretrain.py"), str(tmp_path / "options.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*accelerate, *run], check=True, env=environment, timeout=300)
    # The same program on one process goes on from there.
    (tmp_path / "options.json").write_text(json.dumps({**options, "max_steps": 6, "use_cpu": True}))
    subprocess.run([sys.executable, *run], check=True, env=environment, timeout=300)
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [2, 4, 6]
    assert losses[2] < losses[1] < losses[0]
    figures = json.loads((tmp_path / "run" / "held_out_results.json").read_text())
    assert figures["eval_loss"] < losses[0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.n_layer == 2


def test_models_have_the_sizes_of_their_names() -> None:
    found = {path.stem: json.loads(path.read_text()) for path in (RECIPE / "models").glob("*.json")}
    assert set(found) == {*plan_models.CASES, "demo"}
    for name in plan_models.CASES:
        config = AutoConfig.for_model(**found[name])
        layer = 12 * config.hidden_size**2 + 13 * config.hidden_size
        tables = (config.vocab_size + config.max_position_embeddings + 2) * config.hidden_size
        said = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
        assert config.num_hidden_layers * layer + tables == pytest.approx(said, rel=0.1), name


def test_a_model_is_planned_as_the_table_says() -> None:
    found = plan_models.plan("125m")
    assert found["parameters"] == pytest.approx(125e6, rel=0.02)
    assert plan_models.row("125m", found) in (RECIPE / "README.md").read_text()
