"""Trains a BERT classifier on a loss that the script computes from the logits. Knows nothing of RaNNC."""

import json

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification


def collate(samples):
    longest = max(len(s["input_ids"]) for s in samples)
    ids = torch.tensor([s["input_ids"] + [0] * (longest - len(s["input_ids"])) for s in samples])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([s["labels"] for s in samples]),
    }


accelerator = Accelerator(gradient_accumulation_steps=2)
set_seed(0)
model = BertForSequenceClassification(
    BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
data = [{"input_ids": torch.randint(1, 60, (5 + i % 7,)).tolist(), "labels": i % 3} for i in range(48)]
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=4, collate_fn=collate))
losses, norms = [], []
for batch in loader:
    with accelerator.accumulate(model):
        labels = batch.pop("labels")
        outputs = model(**batch)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.1)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            norms.append(accelerator.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    losses.append(accelerator.gather(loss.detach()).tolist())
record = {"losses": losses, "norms": norms, "model": type(model).__name__}
accelerator.print("RECORD", json.dumps(record))
accelerator.end_training()
