"""Trains a causal language model, in the style of transformers' run_clm_no_trainer.py. Knows nothing of RaNNC.

Tied embeddings, chunks of a text, accumulation over the end of the loader, and an evaluation after each epoch, which
also generates.
"""

import argparse
import json
import math

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, default_data_collator, get_scheduler

VOCABULARY, BLOCK_SIZE = 64, 16


def chunks(count, seed):
    # A text in which each token mostly follows from the one before it.
    generator = torch.Generator().manual_seed(seed)
    text = [1]
    for surprise in torch.rand(count * BLOCK_SIZE, generator=generator).tolist():
        text.append((text[-1] * 5 + (3 if surprise < 0.8 else 11)) % VOCABULARY)
    blocks = [text[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] for i in range(count)]
    return [{"input_ids": b, "attention_mask": [1] * BLOCK_SIZE, "labels": list(b)} for b in blocks]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--per_device_train_batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--num_train_epochs", type=int, default=2)
    args = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    set_seed(5)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=BLOCK_SIZE, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    train_dataloader = DataLoader(
        chunks(40, 1), shuffle=True, collate_fn=default_data_collator, batch_size=args.per_device_train_batch_size
    )
    eval_dataloader = DataLoader(
        chunks(13, 2), collate_fn=default_data_collator, batch_size=args.per_device_train_batch_size
    )

    no_decay = ["bias", "layer_norm.weight"]
    groups = [
        {
            "params": [p for n, p in model.named_parameters() if not any(nd in n for nd in no_decay)],
            "weight_decay": 0.1,
        },
        {"params": [p for n, p in model.named_parameters() if any(nd in n for nd in no_decay)], "weight_decay": 0.0},
    ]
    # A plain 1e-8 turns the rounding errors of gradients that are zero (key biases) into full steps.
    optimizer = torch.optim.AdamW(groups, lr=5e-3, eps=1e-6)
    updates_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.num_train_epochs * updates_per_epoch
    lr_scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=max_train_steps)
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    record = {"losses": [], "learning_rates": [], "perplexities": [], "generated": []}
    completed_steps = 0
    for _ in range(args.num_train_epochs):
        model.train()
        total_loss = 0
        for batch in train_dataloader:
            with accelerator.accumulate(model):
                outputs = model(**batch)
                loss = outputs.loss
                total_loss += accelerator.gather(loss.detach()).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                completed_steps += 1
                record["learning_rates"].append(lr_scheduler.get_last_lr()[0])
        record["losses"].append(total_loss.item() / len(train_dataloader))

        model.eval()
        losses = []
        for batch in eval_dataloader:
            with torch.no_grad():
                outputs = model(**batch)
            losses.append(accelerator.gather_for_metrics(outputs.loss.repeat(args.per_device_train_batch_size)))
            with torch.no_grad():
                prompts = {k: batch[k][:, :8] for k in ("input_ids", "attention_mask")}
                # A model that has hardly been trained repeats one token.
                tokens = accelerator.unwrap_model(model).generate(
                    **prompts, max_new_tokens=6, pad_token_id=0, no_repeat_ngram_size=1
                )
            tokens = accelerator.pad_across_processes(tokens, dim=1, pad_index=0)
            record["generated"] += accelerator.gather_for_metrics(tokens).tolist()
        perplexity = math.exp(torch.cat(losses).mean())
        record["perplexities"].append(perplexity)
        accelerator.print(f"perplexity {perplexity:.2f} after {completed_steps} steps")

    accelerator.wait_for_everyone()
    unwrapped_model = accelerator.unwrap_model(model)
    unwrapped_model.save_pretrained(
        args.output_dir,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    record["model"] = type(model).__name__
    accelerator.print("RECORD", json.dumps(record))
    accelerator.end_training()


if __name__ == "__main__":
    main()
