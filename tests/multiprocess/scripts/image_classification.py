"""Trains a ViT on pictures, in the style of transformers' run_image_classification_no_trainer.py.

Knows nothing of RaNNC.

The picture of a class has its bright spot in a place of its own.
"""

import argparse
import json

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset
from transformers import ViTConfig, ViTForImageClassification

SIZE, CLASSES = 16, 4


class Spots(Dataset):
    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator)
        self.images = torch.randn(count, 3, SIZE, SIZE, generator=generator)
        for image, label in zip(self.images, self.labels.tolist()):
            row, column = divmod(label, 2)
            image[:, row * 8 + 2 : row * 8 + 6, column * 8 + 2 : column * 8 + 6] += 4.0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def collate_fn(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixel_values, "labels": torch.stack([example["labels"] for example in examples])}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--batch_size", type=int, default=6)
    parser.add_argument("--num_epochs", type=int, default=3)
    args = parser.parse_args()

    accelerator = Accelerator()
    set_seed(3)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIZE,
            patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            num_labels=CLASSES, initializer_range=0.1,
        )
    )  # fmt: skip
    train_dataloader = DataLoader(Spots(48, 0), shuffle=True, collate_fn=collate_fn, batch_size=args.batch_size)
    eval_dataloader = DataLoader(Spots(22, 1), collate_fn=collate_fn, batch_size=args.batch_size)
    # A plain 1e-8 turns the rounding errors of gradients that are zero (key biases) into full steps.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 / 25, eps=1e-6)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, epochs=args.num_epochs, steps_per_epoch=len(train_dataloader)
    )
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    record = {"losses": [], "learning_rates": [], "accuracies": []}
    for epoch in range(args.num_epochs):
        model.train()
        for batch in train_dataloader:
            outputs = model(**batch)
            loss = outputs.loss
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            record["losses"].append(accelerator.reduce(loss.detach(), "mean").item())
            record["learning_rates"].append(lr_scheduler.get_last_lr()[0])

        model.eval()
        accurate, elements = 0, 0
        for batch in eval_dataloader:
            with torch.no_grad():
                outputs = model(**batch)
            predictions = outputs.logits.argmax(dim=-1)
            predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
            accurate += (predictions == references).sum().item()
            elements += len(references)
        assert elements == 22
        record["accuracies"].append(accurate / elements)
        accelerator.print(f"epoch {epoch}: accuracy {accurate / elements:.2f}")

    accelerator.wait_for_everyone()
    accelerator.save_model(model, args.output_dir)
    record["model"] = type(model).__name__
    accelerator.print("RECORD", json.dumps(record))
    accelerator.end_training()


if __name__ == "__main__":
    main()
