"""Fine-tunes a checkpoint to tell two kinds of sentences apart, in the style of Transformers' examples."""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_train_epochs", type=int, default=12)
    args = parser.parse_args()

    accelerator = Accelerator()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, num_labels=2)
    sentences = [f"The {noun} {verb} a tree." for noun in ("cat", "dog", "bird") for verb in ("sees", "likes")] * 4
    labels = [int("likes" in sentence) for sentence in sentences]
    data = [{**tokenizer(sentence, truncation=True), "labels": label} for sentence, label in zip(sentences, labels)]
    loader = DataLoader(data, batch_size=8, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(args.num_train_epochs):
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    right = []
    with torch.no_grad():
        for batch in loader:
            right.append(accelerator.gather_for_metrics(model(**batch).logits.argmax(-1) == batch["labels"]))
    accelerator.print(f"accuracy {torch.cat(right).float().mean():.2f}")
    accelerator.unwrap_model(model).save_pretrained(args.output_dir, is_main_process=accelerator.is_main_process)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
