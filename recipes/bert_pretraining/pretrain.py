"""Pretrains BERT (masked tokens and next sentence) on the samples of prepare.py.

A plain Accelerate script: it knows nothing of rannc_hf. The config file that it is launched with decides how it is
spread over devices, from one process to a pipeline with replicas:

    accelerate launch --config_file configs/demo-rannc.yaml pretrain.py --config configs/demo.json \\
        --data runs/demo/data --output runs/demo/model

Started again with the same output, it goes on from the last complete checkpoint.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from checkpoints import Checkpoints, Position
from data import held_out_loader, training_loader
from divergence import Diverged, DivergenceGuard
from evaluation import evaluate
from optimizers import build_optimizer
from progress import Progress
from schedule import learning_rate
from settings import Recipe
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A freshly initialised model for the recipe's architecture. Raises ValueError where it cannot hold the samples."""
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**{**recipe.model, **vocabulary})
    longest = max(phase.data.sequence_length for phase in recipe.phases())
    if config.max_position_embeddings < longest:
        raise ValueError(
            f"model: max_position_embeddings={config.max_position_embeddings} is less than "
            f"data: sequence_length={longest}"
        )
    # Where samples are not made of two segments there is nothing to say of them.
    kind = AutoModelForMaskedLM if recipe.data.next == "none" else AutoModelForPreTraining
    return kind.from_config(config)


@dataclass(slots=True)
class Run:
    """What all phases of a run have in common."""

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    guard: DivergenceGuard
    checkpoints: Checkpoints
    progress: Progress
    step: int
    """Steps done, over all phases."""


def train(accelerator: Accelerator, args: argparse.Namespace, recipe: Recipe) -> torch.nn.Module:
    """Trains all phases, or what is left of them after the last checkpoint in `args.output`."""
    settings, phases = recipe.training, recipe.phases()
    tokenizer = AutoTokenizer.from_pretrained(f"{args.data}/tokenizer")
    plain = build_model(recipe, tokenizer)
    model: torch.nn.Module = plain
    optimizer = build_optimizer(model, settings, accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    guard = DivergenceGuard(accelerator, settings.on_divergence, settings.spike_deviations)
    checkpoints = Checkpoints(accelerator, Path(args.output), recipe)
    position = Position(0, 0, guard.state_dict())
    if (last := checkpoints.last()) is not None:
        position = checkpoints.load(last)
        guard.load_state_dict(position.guard)
        accelerator.print(f"going on from {last}")
    steps = sum(phase.training.steps for phase in phases)
    progress = Progress(accelerator, Path(args.output), steps, position.step, position.metrics_bytes)
    run = Run(accelerator, model, optimizer, guard, checkpoints, progress, position.step)
    before = 0
    for number, phase in enumerate(phases, start=1):
        done = run.step - before
        if done < phase.training.steps:
            progress.begin_phase(number, phase, plain, done)
            train_phase(run, phase, Path(args.data), done)
        before += phase.training.steps
    progress.close()
    return model


def train_phase(run: Run, phase: Recipe, data: Path, done: int) -> None:
    """Trains a phase from its step `done` on, with a held-out loss before its first step, in between and at its end."""
    settings, accelerator, model = phase.training, run.accelerator, run.model
    ranks = {"rank": accelerator.process_index, "ranks": accelerator.num_processes}
    held_out = held_out_loader(data, phase, **ranks)
    batches = training_loader(
        data, phase, **ranks, consumed=done * settings.batch_size, workers=settings.loader_workers
    )
    # A loader starts with a random number. Taken from the global generator, it would put a run that goes on in the
    # middle of a phase one number ahead, and with it all dropout.
    batches.generator = torch.Generator()
    stream = iter(batches)
    first = next(stream)
    if (partition := getattr(model, "partition", None)) is not None:
        # An engine that plans for the batch it sees first should not see that of an evaluation, which may be smaller.
        partition(**send_to_device(first, accelerator.device))
    if done == 0:
        run.guard.begin_phase()
        run.progress.held_out(run.step, evaluate(accelerator, model, held_out))
    for own_step, batch in zip(range(done + 1, settings.steps + 1), chain([first], stream)):
        train_step(run, phase, own_step, batch)
        if own_step % settings.evaluate_every == 0 or own_step == settings.steps:
            run.progress.held_out(run.step, evaluate(accelerator, model, held_out))
        every = settings.checkpoint_every
        if every and (own_step % every == 0 or own_step == settings.steps):
            run.guard.settle()
            run.checkpoints.save(Position(run.step, run.progress.metrics_bytes, run.guard.state_dict()))
            run.progress.restart_clock()
    run.guard.settle()


def train_step(run: Run, phase: Recipe, own_step: int, batch: dict[str, torch.Tensor]) -> None:
    """One step, the `own_step`th of its phase, on this process's share of a batch."""
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    run.step += 1
    rate = learning_rate(phase.training, own_step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    loss = model(**send_to_device(batch, accelerator.device, non_blocking=True)).loss
    accelerator.backward(loss)
    gradient_norm = accelerator.clip_grad_norm_(model.parameters(), phase.training.clip_norm)
    if run.guard.accepts(run.step, loss, gradient_norm):
        optimizer.step()
    optimizer.zero_grad()
    run.progress.step(run.step, loss, gradient_norm, rate, run.guard.reason)


def save(accelerator: Accelerator, model: torch.nn.Module, data: str, output: str) -> None:
    """Writes a folder that `from_pretrained` reads, model and tokenizer. To be called on every process."""
    # Weights first: where no process holds the whole model, each writes a part.
    accelerator.save_model(model, output)
    if accelerator.is_main_process:
        plain = accelerator.unwrap_model(model)
        plain.config.architectures = [type(plain).__name__]
        plain.config.save_pretrained(output)
        AutoTokenizer.from_pretrained(f"{data}/tokenizer").save_pretrained(output)
    accelerator.wait_for_everyone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", required=True, help="a file of configs/")
    add("--data", required=True, help="folder that prepare.py wrote")
    add("--output", required=True, help="folder for the model, its tokenizer, metrics.jsonl and checkpoints")
    add("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="change the config")
    args = parser.parse_args()
    recipe = Recipe.load(args.config, args.set)
    set_seed(recipe.training.seed)
    # The learning rate is set by the step, whatever the number of processes: no scheduler is prepared.
    accelerator = Accelerator()
    try:
        model = train(accelerator, args, recipe)
    except Diverged as error:
        last = Checkpoints(accelerator, Path(args.output), recipe).last()
        raise SystemExit(
            f"the training diverged: {error}. The last good checkpoint is {last}. Started again, the run goes on from "
            "there and meets the same batches: lower learning_rate, or set on_divergence to skip"
        ) from None
    save(accelerator, model, args.data, args.output)
    accelerator.print(f"{args.output}: saved; read it with AutoModelForMaskedLM.from_pretrained")
    accelerator.end_training()


if __name__ == "__main__":
    main()
