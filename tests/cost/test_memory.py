"""Predicted memory and FLOPs of real blocks against what PyTorch keeps and counts on a CPU."""

from __future__ import annotations

import pytest
import torch
import transformers
from graphs import make_graph
from torch.utils.flop_counter import FlopCounterMode

from rannc_hf.capture import capture
from rannc_hf.capture.instantiate import block_function
from rannc_hf.cost import ops
from rannc_hf.cost.memory import block_memory, parameter_bytes
from rannc_hf.cost.work import backward_work

SEQ, SAMPLES = 12, 3


def tokens(*shape):
    return torch.ones(*shape, dtype=torch.long)


def bert():
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    batch = {k: tokens(2, SEQ) for k in ("input_ids", "attention_mask", "labels")}
    return transformers.BertForPreTraining(config), batch | {"next_sentence_label": tokens(2)}


def gpt2():
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, use_cache=False)
    return transformers.GPT2LMHeadModel(config), {k: tokens(2, SEQ) for k in ("input_ids", "labels")}


def llama():
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config), {k: tokens(2, SEQ) for k in ("input_ids", "attention_mask", "labels")}


def t5():
    config = transformers.T5Config(
        vocab_size=96, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), {k: tokens(2, SEQ) for k in ("input_ids", "labels")}


def vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    return transformers.ViTForImageClassification(config), {
        "pixel_values": torch.ones(2, 3, 16, 16),
        "labels": tokens(2),
    }


def captured(make):
    with torch.device("meta"):
        model, batch = make()
    return capture(model, batch)


def tensors(graph, block):
    """Parameters and inputs for the block's function."""
    place = {name: placeholder for placeholder, name in graph.parameter_inputs.items()}
    made = []
    for name in [*(place[p] for p in block.parameters), *block.inputs, *block.preamble]:
        spec = graph.values[name]
        if spec.dtype.is_floating_point:
            made.append(torch.randn(spec.at(SAMPLES), dtype=spec.dtype).requires_grad_(spec.needs_grad))
        else:
            made.append(torch.ones(spec.at(SAMPLES), dtype=spec.dtype))
    return made


def kept_bytes(function, arguments):
    """Bytes of distinct memory that autograd keeps or that is handed on, other than the arguments'."""
    known = {t.untyped_storage().data_ptr() for t in arguments}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = function(*arguments)
    for tensor in outputs:
        note(tensor)
    return sum(kept.values())


@pytest.mark.parametrize("make", [bert, gpt2, llama, t5, vit])
def test_saved_bytes_and_flops_are_those_of_pytorch(make):
    graph = captured(make)
    nodes = graph.nodes
    checked = set()
    for block in graph.blocks:
        if block.key in checked:
            continue
        checked.add(block.key)
        function = block_function(graph, block, SAMPLES, torch.device("cpu"))
        arguments = tensors(graph, block)
        memory = block_memory(graph, block, SAMPLES, cpu=True)
        # The loss keeps a few numbers that are not a tensor of the graph.
        assert memory.saved == pytest.approx(kept_bytes(function, arguments), rel=0.01), block.name
        assert memory.output <= memory.saved and memory.workspace > 0
        inside = [nodes[name] for name in block.nodes]
        if make in (llama, vit) and any("attention" in ops.op_name(n) for n in inside):
            continue  # PyTorch's counter knows no fused attention on CPUs; with dropout it is computed in steps.
        with FlopCounterMode(display=False) as counter:
            outputs = function(*arguments)
        assert sum(ops.forward_flops(n, graph, SAMPLES) for n in inside) == counter.get_total_flops(), block.name
        heads = [t for t in outputs if t.requires_grad]
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(heads, [torch.ones_like(t) for t in heads])
        # In steps, attention computes four products in the backward; fused it computes a fifth.
        backward = sum(
            backward_work(n, graph, SAMPLES).flops * (0.8 if "attention" in ops.op_name(n) else 1.0)
            for n in inside
            if ops.needs_grad(n, graph)
        )
        assert backward == pytest.approx(counter.get_total_flops()), block.name


def test_gpus_keep_less_of_attention_and_dropout():
    graph = captured(bert)
    layer = next(b for b in graph.blocks if "layer.0" in b.name)
    on_cpu, on_gpu = (block_memory(graph, layer, SAMPLES, cpu=c).saved for c in (True, False))
    assert on_gpu < on_cpu


def test_saved_bytes_grow_with_samples():
    graph = make_graph([16, 16])
    one, two, three = (block_memory(graph, graph.blocks[0], n, cpu=True) for n in (1, 2, 3))
    assert two.saved - one.saved == three.saved - two.saved > 0
    # The input of gelu, its result, and the block's output: 4 tokens of 16, 16 and 8 numbers.
    assert one.saved == 4 * (16 + 16 + 8) * 4
    assert one.output == 4 * 8 * 4


def test_copies_to_compute_with():
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)):
        graph = make_graph([16], hidden=8, dtype=dtype)
        assert parameter_bytes(graph, "layer.0.up") == 128 * size
