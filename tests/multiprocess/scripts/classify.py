"""Fine-tunes a BERT classifier, in the style of accelerate's examples/nlp_example.py. Knows nothing of RaNNC."""

import argparse
import json

import torch
from accelerate import Accelerator
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup, set_seed

VOCABULARY, CLASSES = 60, 3


def get_dataloaders(batch_size):
    # Sentences of 5 to 16 tokens, each class with a third of the vocabulary of its own for half of them.
    generator = torch.Generator().manual_seed(0)

    def sentences(count):
        result = []
        for _ in range(count):
            length = int(torch.randint(5, 17, (), generator=generator))
            label = int(torch.randint(0, CLASSES, (), generator=generator))
            tokens = torch.randint(1, VOCABULARY, (length,), generator=generator)
            tokens[::2] = tokens[::2] // CLASSES + label * VOCABULARY // CLASSES + 1
            result.append({"input_ids": tokens.tolist(), "labels": label})
        return result

    def collate(samples):
        longest = max(len(sample["input_ids"]) for sample in samples)
        padded = [sample["input_ids"] + [0] * (longest - len(sample["input_ids"])) for sample in samples]
        return {
            "input_ids": torch.tensor(padded),
            "attention_mask": (torch.tensor(padded) != 0).long(),
            "labels": torch.tensor([sample["labels"] for sample in samples]),
        }

    train = DataLoader(sentences(37), shuffle=True, collate_fn=collate, batch_size=batch_size, drop_last=True)
    evaluation = DataLoader(sentences(21), shuffle=False, collate_fn=collate, batch_size=batch_size)
    return train, evaluation


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_epochs", type=int, default=2)
    args = parser.parse_args()

    accelerator = Accelerator()
    set_seed(42)
    train_dataloader, eval_dataloader = get_dataloaders(batch_size=4)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY + 1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=CLASSES,
        )
    )
    model = model.to(accelerator.device)
    # A plain 1e-8 turns the rounding errors of gradients that are zero (key biases) into full steps.
    optimizer = AdamW(params=model.parameters(), lr=5e-3, eps=1e-6)
    lr_scheduler = get_linear_schedule_with_warmup(
        optimizer=optimizer, num_warmup_steps=4, num_training_steps=len(train_dataloader) * args.num_epochs
    )
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    record = {"losses": [], "learning_rates": [], "logits": [], "references": []}
    for epoch in range(args.num_epochs):
        model.train()
        for batch in train_dataloader:
            outputs = model(**batch)
            loss = outputs.loss
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            record["losses"].append(accelerator.gather(loss.detach()).mean().item())
            record["learning_rates"].append(lr_scheduler.get_last_lr()[0])

        model.eval()
        correct, total = 0, 0
        for batch in eval_dataloader:
            with torch.no_grad():
                outputs = model(**batch)
            logits, references = accelerator.gather_for_metrics((outputs.logits, batch["labels"]))
            record["logits"] += logits.tolist()
            record["references"] += references.tolist()
            correct += (logits.argmax(dim=-1) == references).sum().item()
            total += len(references)
        accelerator.print(f"epoch {epoch}: accuracy {correct / total:.3f}")

    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    record["model"] = type(model).__name__
    record["processes"] = accelerator.num_processes
    accelerator.print("RECORD", json.dumps(record))
    accelerator.end_training()


if __name__ == "__main__":
    main()
