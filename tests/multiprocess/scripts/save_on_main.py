"""Saves in the main process alone, as many scripts do: not possible where each process holds a part of the model."""

import sys

import torch
from accelerate import Accelerator
from transformers import BertConfig, BertForMaskedLM

accelerator = Accelerator()
config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
model = accelerator.prepare(BertForMaskedLM(config))
tokens = torch.arange(32).reshape(2, 16)
model(input_ids=tokens, labels=tokens).loss.backward()
print("trained", flush=True)
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(sys.argv[1])
model(input_ids=tokens, labels=tokens)
