"""The command `rannc`. Each subcommand is imported when it is run: none waits for what it does not use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

_FAILED = 2
"""Exit status where nothing fits or the input is wrong."""

COMMANDS = {
    "plan": ("plan the training of a model on a cluster", "rannc_hf.cli.plan"),
    "report": ("show a plan, and a measured step, as a page for a browser", "rannc_hf.cli.report"),
    "doctor": ("measure the devices and links of this machine, for the planner", "rannc_hf.cli.doctor"),
    "export": ("turn a checkpoint into a directory that from_pretrained loads", "rannc_hf.cli.export"),
    "launch": ("run a training script on the processes of this machine or a cluster", "rannc_hf.cli.launch"),
}
"""Subcommand to what it does and the module whose `run` takes its arguments and returns the exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status. What is wrong goes to the standard error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else _FAILED
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"rannc: unknown command {name!r}\n{_usage()}", file=sys.stderr)
        return _FAILED
    try:
        status: int = importlib.import_module(COMMANDS[name][1]).run(rest)
    except (ValueError, OSError) as error:
        print(f"rannc {name}: {error}", file=sys.stderr)
        return _FAILED
    return status


def _usage() -> str:
    lines = [f"  rannc {name:<8} {text}" for name, (text, _) in COMMANDS.items()]
    return "\n".join(["usage: rannc COMMAND [options]", "", *lines, "", "rannc COMMAND --help shows the options."])
