"""Pretrains a masked language model, in the style of transformers' run_mlm_no_trainer.py. Knows nothing of RaNNC.

Gradient accumulation, clipping, two groups of parameters, a tracker, and the optimizer prepared before the model.
"""

import json
import math
import os
import sys

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, BertConfig, default_data_collator, get_scheduler

VOCABULARY, LENGTH, BATCH_SIZE = 60, 12, 4


class JsonTracker(GeneralTracker):
    name = "json"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.entries = []

    @property
    def tracker(self):
        return self.entries

    def store_init_configuration(self, values):
        self.entries.append(values)

    def log(self, values, step=None, **kwargs):
        self.entries.append({"step": step, **values})


def samples(count, seed):
    # Every sample has three labels: the mean over ranks, which DDP takes, is then the mean over all labels.
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        tokens = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        masked = torch.randperm(LENGTH, generator=generator)[:3]
        labels = torch.full_like(tokens, -100)
        labels[masked] = tokens[masked]
        tokens[masked] = 0
        result.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    return result


def main():
    output_dir = sys.argv[1]
    tracker = JsonTracker()
    accelerator = Accelerator(gradient_accumulation_steps=2, log_with=tracker)
    set_seed(7)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = AutoModelForMaskedLM.from_config(config)
    train_dataloader = DataLoader(samples(37, 1), shuffle=True, collate_fn=default_data_collator, batch_size=BATCH_SIZE)
    eval_dataloader = DataLoader(samples(21, 2), collate_fn=default_data_collator, batch_size=BATCH_SIZE)

    no_decay = ["bias", "LayerNorm.weight"]
    decayed = [p for n, p in model.named_parameters() if not any(nd in n for nd in no_decay)]
    others = [p for n, p in model.named_parameters() if any(nd in n for nd in no_decay)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, eps=1e-6)
    lr_scheduler = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=2, num_training_steps=24)
    optimizer, lr_scheduler, train_dataloader, eval_dataloader, model = accelerator.prepare(
        optimizer, lr_scheduler, train_dataloader, eval_dataloader, model
    )
    accelerator.init_trackers("masked_lm", config={"batch_size": BATCH_SIZE})

    record = {"losses": [], "norms": [], "learning_rates": [], "perplexities": [], "scores": []}
    completed_steps = 0
    for epoch in range(2):
        model.train()
        for batch in train_dataloader:
            with accelerator.accumulate(model):
                outputs = model(**batch)
                loss = outputs.loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    record["norms"].append(float(norm))
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            record["losses"].append(accelerator.gather(loss.detach()).mean().item())
            record["learning_rates"].append(lr_scheduler.get_last_lr()[0])
            completed_steps += accelerator.sync_gradients

        model.eval()
        losses = []
        for batch in eval_dataloader:
            with torch.no_grad():
                outputs = model(**batch)
            losses.append(accelerator.gather_for_metrics(outputs.loss.repeat(BATCH_SIZE)))
            record["scores"] += accelerator.gather_for_metrics(outputs.logits.amax(-1)).tolist()
        perplexity = math.exp(torch.cat(losses).mean())
        record["perplexities"].append(perplexity)
        accelerator.log({"perplexity": perplexity, "epoch": epoch}, step=completed_steps)

    accelerator.wait_for_everyone()
    unwrapped_model = accelerator.unwrap_model(model)
    unwrapped_model.save_pretrained(
        os.path.join(output_dir, "pretrained"),
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    accelerator.save_model(model, os.path.join(output_dir, "saved"))
    record["tracked"] = tracker.entries
    record["model"] = type(model).__name__
    accelerator.print("RECORD", json.dumps(record))
    accelerator.end_training()


if __name__ == "__main__":
    main()
