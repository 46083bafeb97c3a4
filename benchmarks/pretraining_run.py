"""A real pretraining run of recipes/bert_pretraining, killed in the middle and started again.

    python benchmarks/pretraining_run.py --config large --data D --kill-at 500 --output NAME       # one GPU or several
    python benchmarks/pretraining_run.py --config 5B --synthetic --steps 3 --devices 8 --output NAME

The run is the recipe's own program under `rannc launch`, in processes of its own. When it has logged step `--kill-at`,
all its processes get SIGKILL; then the same command is started again, which goes on from the last checkpoint. Steps
that were trained twice, before and after, are compared. Writes NAME.json (everything that was logged), NAME.md (tables)
and NAME.svg (the loss curve).

`--data` is a folder that prepare.py wrote for all phases. `--synthetic` writes one of random tokens instead: it says
how fast a model trains, and nothing else. `--prepare FOLDER` makes one from the documentation in the Python packages
that are installed here, and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from pretraining import page, text

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "bert_pretraining"
_POLL_S = 0.2


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", required=True, help="a file, or the name of one in the recipe's configs/")
    add("--data", type=Path, help="folder that prepare.py wrote")
    add("--synthetic", action="store_true", help="random tokens in its place")
    add("--prepare", type=Path, metavar="FOLDER", help="make data from installed packages there, and end")
    add("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="change the config; values are JSON")
    add("--steps", type=int, help="train the last phase alone, so many steps, and save nothing")
    add("--kill-at", type=int, metavar="STEP", help="step at which all processes are killed, to be started again")
    add("--devices", type=int, default=1, help="processes")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rannc", default="auto", help="options of RaNNC: auto, a file or JSON")
    add("--folder", type=Path, help="for data, checkpoints and the model; default: a temporary one")
    add("--limit", type=float, default=1800.0, metavar="SECONDS", help="end the run by then")
    add("--output", type=Path)
    options = parser.parse_args(words)
    if options.prepare is None and (options.data is None) != options.synthetic:
        parser.error("give --data, or --synthetic")
    if options.prepare is None and options.output is None:
        parser.error("the following arguments are required: --output")
    if not Path(options.config).is_file():
        options.config = RECIPE / "configs" / f"{options.config}.json"
    return options


@dataclass(frozen=True)
class Attempt:
    """One start of the run."""

    seconds: float
    killed: bool
    lines: list[dict[str, Any]]
    """What metrics.jsonl held at its end."""

    resumed_at: int
    """Step of the checkpoint that it began with; 0 for none."""

    problem: str | None
    """Why it is no success, with the end of what it printed."""


class Training:
    """The run: its command, its folder, and what it has logged."""

    def __init__(self, options: argparse.Namespace, data: Path, folder: Path) -> None:
        self.output = folder / "output"
        self._log = folder / "log.txt"
        self._deadline = time.monotonic() + options.limit
        launch = [sys.executable, "-m", "rannc_hf.cli", "launch", "--num_processes", str(options.devices)]
        launch += ["--num_machines", "1", "--dynamo_backend", "no", "--rannc", options.rannc]
        launch += ["--mixed_precision", "bf16" if options.device == "cuda" else "no"]
        launch += ["--cpu"] if options.device == "cpu" else ["--multi_gpu"] if options.devices > 1 else []
        script = [str(RECIPE / "pretrain.py"), "--config", str(options.config), "--data", str(data)]
        self.command = [*launch, *script, "--output", str(self.output)]

    def lines(self) -> list[dict[str, Any]]:
        """What is in metrics.jsonl; a line that is being written is left out."""
        path = self.output / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def attempt(self, kill_at: int | None) -> Attempt:
        """Starts the run and waits for its end, which is soon after it has logged step `kill_at`."""
        paths = os.environ.get("PYTHONPATH")
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{paths}" if paths else str(ROOT)}
        started, resumed_at = time.monotonic(), self._checkpoint()
        with self._log.open("w") as log:
            process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            killed, problem = False, None
            while process.poll() is None:
                late = time.monotonic() > self._deadline
                reached = kill_at is not None and any("loss" in v and v["step"] >= kill_at for v in self.lines())
                if late or reached:
                    kill(process)
                    killed = True
                    problem = "it was not done in time" if late else None
                time.sleep(_POLL_S)
        if process.returncode and not killed:
            problem = f"it ended with status {process.returncode}"
        if kill_at is not None and not killed and problem is None:
            problem = f"it ended before it had logged step {kill_at}"
        if problem is not None:
            problem = f"{problem}; it printed\n{self._tail()}"
        return Attempt(time.monotonic() - started, killed, self.lines(), resumed_at, problem)

    def _checkpoint(self) -> int:
        found = sorted((self.output / "checkpoints").glob("step_*.json"))
        return int(found[-1].stem.removeprefix("step_")) if found else 0

    def _tail(self) -> str:
        return self._log.read_text(errors="replace").replace("\r", "\n")[-6000:]


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a launcher and all that it has started; torchrun gives its processes sessions of their own."""
    parent = psutil.Process(process.pid)
    family = [parent, *parent.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family[1:], timeout=30)


def changed(options: argparse.Namespace, folder: Path) -> Path:
    """The config as the options change it, in `folder`."""
    content = json.loads(Path(options.config).read_text(encoding="utf-8"))
    for change in options.set:
        name, _, value = change.partition("=")
        section, _, key = name.partition(".")
        content[section][key] = json.loads(value)
    if options.steps is not None:
        training = content["training"]
        last = {**(training.get("phases") or [{}])[-1], "steps": options.steps, "warmup_steps": 0}
        training |= {"phases": [last], "log_every": 1, "checkpoint_every": 0}
    if options.synthetic:
        # There are few documents, and two of them are needed for the held-out part.
        content["data"]["held_out"] = 0.1
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    if options.prepare is not None:
        text.from_packages(options.prepare, changed(options, options.prepare), RECIPE)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        options.config = changed(options, folder)
        data = options.data
        if options.synthetic:
            text.random_tokens(folder / "random", options.config, RECIPE)
            data = folder / "random" / "data"
        training = Training(options, data.resolve(), folder)
        print(shlex.join(training.command), flush=True)
        # After a few steps nothing is worth saving: the last one is the end.
        attempts = [training.attempt(options.steps if options.kill_at is None else options.kill_at)]
        if options.kill_at is not None and attempts[0].problem is None:
            print(f"killed after {attempts[0].seconds:.0f} s; started again", flush=True)
            attempts.append(training.attempt(None))
        command = [word.replace(f"{ROOT}/", "") for word in ("python", *training.command[1:])]
        return 0 if page.write(options, command, attempts) else 1


if __name__ == "__main__":
    sys.exit(main())
