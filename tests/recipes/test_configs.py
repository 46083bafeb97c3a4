"""The configs of the BERT recipe, and what is planned for them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import plan_configs
import pytest
from settings import Recipe

FOLDER = Path(plan_configs.__file__).parent
CONFIGS = sorted((FOLDER / "configs").glob("*.json"))


def test_all_configs_are_in_the_table_that_is_written():
    assert sorted(path.stem for path in CONFIGS) == sorted(plan_configs.ORDER)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_how_large_it_is_where_it_runs_and_what_is_planned(path):
    recipe = Recipe.load(path)
    model, cluster = recipe.model, recipe.cluster
    hidden, layers = model["hidden_size"], model["num_hidden_layers"]
    assert model["num_attention_heads"] * 32 <= hidden <= model["num_attention_heads"] * 64
    if re.fullmatch(r"[\d.]+B", path.stem):
        parameters = layers * 12 * hidden**2 + recipe.tokenizer.vocabulary_size * hidden
        assert parameters / 1e9 == pytest.approx(float(path.stem[:-1]), rel=0.03)
    longest = max(phase.data.sequence_length for phase in recipe.phases())
    assert model["max_position_embeddings"] == longest
    assert cluster["devices"] and cluster["command"]
    if cluster["command"] != "make demo":
        assert f"configs/{path.name}" in cluster["command"]
        script = re.search(r"launch/\w+\.sh", cluster["command"])[0]
        assert (FOLDER / script).is_file()
    assert len(cluster["plans"]) == len(recipe.phases())
    for phase, planned in zip(recipe.phases(), cluster["plans"]):
        assert planned["sequence_length"] == phase.data.sequence_length
        assert planned["batch_size"] == phase.training.batch_size
        assert len(planned["replicas"]) == planned["stages"]


def test_the_demo_is_planned_as_stated():
    (phase,) = Recipe.load(FOLDER / "configs" / "demo.json").phases()
    (stated,) = phase.cluster["plans"]
    found = plan_configs.plan(phase)
    exact = ("stages", "replicas", "microbatches", "recompute", "shard", "parameters")
    assert {key: found[key] for key in exact} == {key: stated[key] for key in exact}
    assert found["peak_gib"] == pytest.approx(stated["peak_gib"], rel=0.1)
    assert found["samples_per_s"] == pytest.approx(stated["samples_per_s"], rel=0.1)


def test_the_table_is_written_between_its_marks(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    content = json.loads((FOLDER / "configs" / "demo.json").read_text())
    for name in plan_configs.ORDER:
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "README.md").write_text(f"Before.\n\n{plan_configs.BEGIN}\nold\n{plan_configs.END}\n\nAfter.\n")
    (planned,) = content["cluster"]["plans"]
    monkeypatch.setattr(plan_configs, "HERE", tmp_path)
    monkeypatch.setattr(plan_configs, "plan", lambda phase: {**planned, "samples_per_s": 1000.0})
    monkeypatch.setattr("sys.argv", ["plan_configs.py"])
    plan_configs.main()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("Before.\n\n<!--") and text.endswith("-->\n\nAfter.\n") and "old" not in text
    # 100 billion tokens at 64,000 a second.
    assert text.count("| 1,000 | 18.1 |") == len(plan_configs.ORDER)
