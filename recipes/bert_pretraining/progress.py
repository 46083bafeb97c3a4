"""What a run reports: a progress bar, and a JSON object a line in `metrics.jsonl`, both by the main process."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from evaluation import HeldOut
from settings import Recipe
from throughput import flops_per_sample, peak_tflops
from transformers import PreTrainedModel


class Progress:
    """Reports steps, evaluations and checkpoints. All methods are called on every process.

    `metrics_bytes` is that of the checkpoint that the run goes on from, 0 for a new run: what the file has beyond is
    removed, for it will be written again.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, steps: int, done: int, metrics_bytes: int) -> None:
        self._accelerator = accelerator
        self._file = None
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            path.touch()
            self._file = path.open("r+", encoding="utf-8")
            self._file.truncate(metrics_bytes)
            self._file.seek(0, 2)
        self._bar = tqdm(total=steps, initial=done, desc="pretraining", unit="step")

    def begin_phase(self, number: int, phase: Recipe, model: PreTrainedModel, done: int) -> None:
        """A phase begins, or goes on after `done` of its steps."""
        self._number, self._phase, self._done = number, phase, done
        self._tflop = self._peak = 0.0
        if self._accelerator.is_main_process:
            self._tflop = flops_per_sample(model, phase.data.sequence_length) / 1e12
            self._peak = peak_tflops(self._accelerator.device) or 0.0
        self._start_window()

    def _start_window(self) -> None:
        self._loss = torch.zeros((), device=self._accelerator.device)
        self._steps = self._skipped = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """What came since the last step was no training."""
        self._start = time.perf_counter()

    def step(
        self, step: int, loss: torch.Tensor, gradient_norm: torch.Tensor, rate: float, skipped: str | None
    ) -> None:
        """Reports the means of every `log_every` steps; only then do the processes wait for each other.

        skipped: why the step was left out, if it was: it is reported, and does not count in the mean loss.
        """
        settings = self._phase.training
        self._bar.update()
        self._done += 1
        self._steps += 1
        if skipped is None:
            self._loss += loss.detach()
        else:
            self._skipped += 1
            self.say(f"step {step} was left out: {skipped}")
            self.write(step, {"skipped": skipped})
        if self._done % settings.log_every and self._done < settings.steps:
            return
        loss_sum = self._accelerator.reduce(self._loss, "mean").item()
        per_second = self._steps * settings.batch_size / (time.perf_counter() - self._start)
        norm = float(gradient_norm)
        values: dict[str, Any] = {"learning_rate": rate, "gradient_norm": norm if math.isfinite(norm) else None}
        taken = self._steps - self._skipped
        # JSON has no NaN; the step after one that is not finite ends the run.
        if taken and math.isfinite(loss_sum):
            values = {"loss": loss_sum / taken, **values}
            self._bar.set_postfix(loss=f"{values['loss']:.3f}", samples_per_s=f"{per_second:.0f}")
        self.write(step, {**values, **self._rates(per_second)})
        self._start_window()

    def _rates(self, per_second: float) -> dict[str, Any]:
        """Work done in a second, by all devices and by each."""
        each = per_second * self._tflop / self._accelerator.num_processes
        rates: dict[str, Any] = {
            "samples_per_s": per_second,
            "tokens_per_s": per_second * self._phase.data.sequence_length,
            "tflops_per_device": each,
        }
        if self._peak:
            rates["mfu"] = each / self._peak
        # What knows how the model is spread over devices knows more: predictions, and its own view of each step.
        engine: dict[str, float] = getattr(self._accelerator, "rannc_figures", dict)()
        return {**rates, "engine": engine} if engine else rates

    def held_out(self, step: int, figures: HeldOut) -> None:
        """Reports an evaluation."""
        self.write(step, figures.to_dict())
        self.say(f"step {step}: held-out {figures}")
        self.restart_clock()

    def say(self, text: str) -> None:
        """A line for people."""
        if self._accelerator.is_main_process:
            self._bar.write(text)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "phase": self._number, **values}) + "\n")
            self._file.flush()

    @property
    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl, on the main process."""
        return self._file.tell() if self._file is not None else 0

    def close(self) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()
