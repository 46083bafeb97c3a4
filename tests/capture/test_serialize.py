"""Graphs on disk: what comes back plans, places and computes the same."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rannc_hf.capture import capture
from rannc_hf.capture.blocks import block_of
from rannc_hf.capture.instantiate import block_function, preamble_function
from rannc_hf.capture.passes.masks import unmask
from rannc_hf.capture.passes.schema import is_random
from rannc_hf.capture.serialize import load_graph, save_graph
from tests.parity.models import CASES

CPU = torch.device("cpu")
KEY = {"model": "tiny", "torch": "2"}


@pytest.fixture(scope="module", params=["bert", "gpt2", "t5", "resnet"])
def graph(request):
    case = CASES[request.param]
    return capture(case.model(), case.batch_as(4))


def random_inputs(graph, names, samples):
    generator = torch.Generator().manual_seed(0)
    made = []
    for name in names:
        spec = graph.values[name]
        if spec.dtype.is_floating_point:
            made.append(torch.randn(spec.at(samples), generator=generator, dtype=spec.dtype))
        else:
            made.append(torch.ones(spec.at(samples), dtype=spec.dtype))
    return made


def test_round_trip(graph, tmp_path):
    path = tmp_path / "deep" / "graph.safetensors"
    assert save_graph(graph, path, KEY)
    again = load_graph(path, KEY)
    for field in dataclasses.fields(graph):
        if field.name not in ("fx_graph", "constants", "output_spec", "output_leaves"):
            assert getattr(again, field.name) == getattr(graph, field.name), field.name
    assert graph.constants.keys() == again.constants.keys()
    assert all(torch.equal(t, again.constants[n]) for n, t in graph.constants.items())
    # Keys are hashes of operations, wiring, shapes and dtypes: made anew from the nodes, they are the same.
    nodes = {n.name: n for n in again.fx_graph.nodes}
    remade = [
        block_of(again, b.index, [nodes[n] for n in b.nodes], [nodes[n] for n in b.outputs]) for b in graph.blocks
    ]
    assert remade == list(graph.blocks)
    assert again.gradient_parameters() == graph.gradient_parameters()
    for ours, theirs in zip(again.fx_graph.nodes, graph.fx_graph.nodes, strict=True):
        assert str(ours.format_node()) == str(theirs.format_node())
        assert is_random(ours) == is_random(theirs)


def test_it_computes_the_same(graph, tmp_path):
    save_graph(graph, tmp_path / "graph", KEY)
    again = load_graph(tmp_path / "graph", KEY)
    placeholders = {name: p for p, name in graph.parameter_inputs.items()}
    for block in {b.key: b for b in graph.blocks}.values():
        names = [*(placeholders[p] for p in block.parameters), *block.inputs, *block.preamble]
        arguments = random_inputs(graph, names, 3)
        first, second = (block_function(g, block, 3, CPU)(*arguments) for g in (graph, again))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    shared = tuple(dict.fromkeys(name for b in graph.blocks for name in b.preamble))
    if shared:
        (ours, inputs), (theirs, same) = (preamble_function(g, shared, 3, CPU) for g in (graph, again))
        assert inputs == same
        arguments = [graph.constants[n] if n in graph.constants else random_inputs(graph, [n], 3)[0] for n in inputs]
        assert all(torch.equal(a, b) for a, b in zip(ours(*arguments), theirs(*arguments), strict=True))


def test_variants_and_evaluation(tmp_path):
    case = CASES["bert"]
    evaluation = capture(case.model(), case.batch_as(4), training=False)
    save_graph(evaluation, tmp_path / "evaluation", KEY)
    again = load_graph(tmp_path / "evaluation", KEY)
    assert again.outputs == evaluation.outputs and not again.training
    graph = capture(case.model(), case.batch_as(4))
    save_graph(graph, tmp_path / "training", KEY)
    variants = [unmask(g) for g in (graph, load_graph(tmp_path / "training", KEY))]
    assert [b.key for b in variants[0].graph.blocks] == [b.key for b in variants[1].graph.blocks]


def test_reading_needs_no_model(tmp_path):
    save_graph(capture(CASES["bert"].model(), CASES["bert"].batch_as(4)), tmp_path / "graph", KEY)
    script = f"""
import sys
from pathlib import Path
from rannc_hf.capture.serialize import load_graph
graph = load_graph(Path({str(tmp_path / "graph")!r}), {KEY})
assert graph.output_spec is None and len(graph.blocks) > 2
print([m for m in ("transformers", "torch._dynamo") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.fixture
def saved(tmp_path):
    """The path of a small graph, and a function that writes it again with changes to its JSON."""
    path = tmp_path / "graph.safetensors"
    save_graph(capture(CASES["resnet"].model(), CASES["resnet"].batch_as(4)), path, KEY)

    def change(edit):
        with safe_open(path, "pt") as file:
            header = file.metadata()
        data = json.loads(header["graph"])
        edit(data)
        save_file({}, path, header | {"graph": json.dumps(data)})

    return path, change


def test_another_key_is_refused_by_field(saved):
    path, _ = saved
    with pytest.raises(ValueError, match=r"made for another torch: found '2', expected '3'"):
        load_graph(path, KEY | {"torch": "3"})
    with pytest.raises(ValueError, match=r"made for another dtype: found None, expected 'bf16'"):
        load_graph(path, KEY | {"dtype": "bf16"})
    with pytest.raises(FileNotFoundError):
        load_graph(path.with_name("absent"), KEY)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{", b"[]" * 100])
def test_a_damaged_file_is_refused(saved, content):
    path, _ = saved
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be used"):
        load_graph(path, KEY)
    path.write_bytes(b"")
    save_file({}, path, {"format": "other"})
    with pytest.raises(ValueError, match="is not a 'rannc_hf graph 2' file"):
        load_graph(path, KEY)


def first(data, op):
    return next(n for n in data["nodes"] if n[0] == op)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("blocks"), "blocks"),
        (lambda d: first(d, "call_function").__setitem__(2, "os.system.default"), "os"),
        (lambda d: first(d, "call_function").__setitem__(2, "aten.linear.__class__"), "no operation of PyTorch"),
        (lambda d: first(d, "call_function").__setitem__(2, "eval"), "cannot be used"),
        (lambda d: first(d, "placeholder").__setitem__(0, "get_attr"), "unknown kind 'get_attr'"),
        (lambda d: first(d, "call_function").__setitem__(3, [{"load": "float32"}]), "float32 is no load"),
        (lambda d: first(d, "call_function").__setitem__(3, [{"dtype": "load"}]), "load is no dtype"),
        (lambda d: first(d, "call_function").__setitem__(1, d["nodes"][0][1]), "two nodes called"),
    ],
)
def test_only_operations_of_pytorch_are_found(saved, edit, message):
    path, change = saved
    change(edit)
    with pytest.raises(ValueError, match=message):
        load_graph(path, KEY)


def test_what_has_no_place_in_a_file(saved):
    graph = load_graph(saved[0], KEY)
    node = next(n for n in graph.fx_graph.nodes if n.op == "call_function")
    node.args = (*node.args, 1j)
    with pytest.raises(ValueError, match="complex has no place"):
        save_graph(graph, saved[0], KEY)
    node.target = print
    with pytest.raises(ValueError, match="is no operation of PyTorch"):
        save_graph(graph, saved[0], KEY)
