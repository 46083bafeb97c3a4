"""Pretrains BERT (masked tokens and next sentence) on the samples of prepare.py.

A plain Accelerate script: it knows nothing of rannc_hf. The config file that it is launched with decides how it is
spread over devices, from one process to a pipeline with replicas:

    accelerate launch --config_file configs/demo-rannc.yaml pretrain.py --config configs/demo.json \\
        --data runs/demo/data --output runs/demo/model
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import set_seed, tqdm
from data import MaskingCollator
from datasets import load_from_disk
from evaluation import HeldOut, evaluate
from settings import Recipe, TrainingSettings
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForPreTraining,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A freshly initialised model for the recipe's architecture. Raises ValueError where it cannot hold the samples."""
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**{**recipe.model, **vocabulary})
    if config.max_position_embeddings < recipe.data.sequence_length:
        raise ValueError(
            f"model: max_position_embeddings={config.max_position_embeddings} is less than "
            f"data: sequence_length={recipe.data.sequence_length}"
        )
    return AutoModelForPreTraining.from_config(config)


def build_optimizer(model: torch.nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW without weight decay on vectors: biases and the scales of layer norms."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.adam_beta2))


def build_loaders(data: str, recipe: Recipe, processes: int) -> tuple[DataLoader, DataLoader]:
    """Loaders of the training and the held-out samples, for batches of one process."""
    settings = recipe.training
    splits = load_from_disk(data)
    tokenizer = AutoTokenizer.from_pretrained(f"{data}/tokenizer")
    if settings.batch_size % processes:
        raise ValueError(f"training: batch_size={settings.batch_size} cannot be shared evenly by {processes} processes")
    if len(splits["train"]) < settings.batch_size:
        raise ValueError(f"{data}: {len(splits['train'])} samples do not fill a batch of {settings.batch_size}")

    def loader(name: str, training: bool) -> DataLoader:
        # A collator each: the epoch of the training masks must not change what is hidden in the held-out part.
        collator = MaskingCollator(tokenizer, recipe.data.sequence_length, recipe.data.mask_probability, settings.seed)
        size = settings.batch_size // processes
        return DataLoader(splits[name], size, shuffle=training, drop_last=training, collate_fn=collator)

    return loader("train", True), loader("held_out", False)


class Progress:
    """What the run reports: a progress bar, and a JSON object a line in `metrics.jsonl`, both by the main process."""

    def __init__(self, accelerator: Accelerator, settings: TrainingSettings, folder: Path) -> None:
        self._accelerator = accelerator
        self._settings = settings
        self._file: TextIO | None = None
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._bar = tqdm(total=settings.steps, desc="pretraining", unit="step")
        self._start_window()

    def _start_window(self) -> None:
        self._loss = torch.zeros((), device=self._accelerator.device)
        self._steps = 0
        self._start = time.perf_counter()

    def step(self, step: int, loss: torch.Tensor, gradient_norm: torch.Tensor, learning_rate: float) -> None:
        """Reports the mean over the last `log_every` steps; only then do the processes wait for each other."""
        self._bar.update()
        self._loss += loss.detach()
        self._steps += 1
        if self._steps < self._settings.log_every and step < self._settings.steps:
            return
        mean_loss = self._accelerator.reduce(self._loss, "mean").item() / self._steps
        rate = self._steps * self._settings.batch_size / (time.perf_counter() - self._start)
        self._bar.set_postfix(loss=f"{mean_loss:.3f}", samples_per_s=f"{rate:.0f}")
        self._write(
            step,
            {
                "loss": mean_loss,
                "samples_per_s": rate,
                "learning_rate": learning_rate,
                "gradient_norm": float(gradient_norm),
            },
        )
        self._start_window()

    def held_out(self, step: int, figures: HeldOut) -> None:
        self._write(step, figures.to_dict())
        if self._accelerator.is_main_process:
            self._bar.write(f"step {step}: held-out {figures}")
        # The next samples/s should not count the evaluation.
        self._start = time.perf_counter()

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()


def endless(loader: DataLoaderShard, collator: MaskingCollator) -> Iterator[dict[str, torch.Tensor]]:
    """Batches for ever; every epoch has its own order and its own masks."""
    for epoch in itertools.count():
        collator.epoch = epoch
        loader.set_epoch(epoch)
        yield from loader


def train(accelerator: Accelerator, args: argparse.Namespace, recipe: Recipe) -> torch.nn.Module:
    """Trains for `recipe.training.steps` steps, with a held-out loss before, in between and after."""
    settings = recipe.training
    train_loader, held_out_loader = build_loaders(args.data, recipe, accelerator.num_processes)
    collator = train_loader.collate_fn
    assert isinstance(collator, MaskingCollator)
    model: torch.nn.Module = build_model(recipe, collator.tokenizer)
    optimizer = build_optimizer(model, settings)
    scheduler = get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    model, optimizer, train_loader, held_out_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, held_out_loader, scheduler
    )
    progress = Progress(accelerator, settings, Path(args.output))
    progress.held_out(0, evaluate(accelerator, model, held_out_loader))
    batches = endless(train_loader, collator)
    for step in range(1, settings.steps + 1):
        model.train()
        loss = model(**next(batches)).loss
        accelerator.backward(loss)
        gradient_norm = accelerator.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        optimizer.zero_grad()
        progress.step(step, loss, gradient_norm, learning_rate)
        if step % settings.evaluate_every == 0 or step == settings.steps:
            progress.held_out(step, evaluate(accelerator, model, held_out_loader))
    progress.close()
    return model


def save(accelerator: Accelerator, model: torch.nn.Module, data: str, output: str) -> None:
    """Writes a folder that `from_pretrained` reads, model and tokenizer. To be called on every process."""
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output, state_dict=state)
        AutoTokenizer.from_pretrained(f"{data}/tokenizer").save_pretrained(output)
    accelerator.wait_for_everyone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--data", required=True, help="folder that prepare.py wrote")
    parser.add_argument("--output", required=True, help="folder for the model, its tokenizer and metrics.jsonl")
    args = parser.parse_args()
    recipe = Recipe.load(args.config)
    seed = recipe.training.seed
    set_seed(seed)
    accelerator = Accelerator(
        # The order of the samples then depends on the seed and the epoch alone, not on the number of processes.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
        # One scheduler step a step: batch_size is that of all processes together.
        step_scheduler_with_optimizer=False,
    )
    model = train(accelerator, args, recipe)
    save(accelerator, model, args.data, args.output)
    accelerator.print(f"{args.output}: saved; read it with AutoModelForMaskedLM.from_pretrained")
    accelerator.end_training()


if __name__ == "__main__":
    main()
