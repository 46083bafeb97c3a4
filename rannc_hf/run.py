"""Runs a training script with `accelerate.Accelerator` and `transformers.Trainer` replaced by our own.

    python -m rannc_hf.run script.py [argument ...]
    python -m rannc_hf.run -m package.module [argument ...]

Launchers start this file in every worker: `accelerate launch` with a `rannc_config:` section, `rannc launch`, or by
hand `accelerate launch -m rannc_hf.run script.py`. The options come from RANNC_CONFIG. The script sees the `sys.argv`,
`sys.path` and `__main__` it would see without us, but accelerate and transformers are imported before it runs: what
they read from the environment at that time (HF_HOME, HF_HUB_OFFLINE) must be set outside of the script.
"""

from __future__ import annotations

import io
import os
import runpy
import sys
import types


def main() -> None:
    """Run the script named on the command line. Its exceptions and exit status are passed on."""
    arguments = sys.argv[1:]
    as_module = arguments[:1] == ["-m"]
    sys.argv = arguments[as_module:]
    if not sys.argv:
        sys.exit("usage: python -m rannc_hf.run [-m] SCRIPT [ARGUMENT ...]")
    script = sys.argv[0]
    if not sys.flags.safe_path:
        # This file's folder (or, for `-m`, the working directory), whose modules could shadow what we import.
        sys.path.pop(0)
    _replace_classes()
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd() if as_module else os.path.dirname(os.path.realpath(script)))
    if as_module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        _run_script(script)


def _replace_classes() -> None:
    try:
        from rannc_hf.integrations.replace import replace_classes
    except ModuleNotFoundError as error:
        if error.name != "rannc_hf":
            raise
        # Started by its path from a source tree that is not installed.
        sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        from rannc_hf.integrations.replace import replace_classes
    replace_classes()


def _run_script(path: str) -> None:
    # runpy.run_path would make `sys.argv[0]` absolute or `__file__` relative; a script sees the opposite of both.
    main_module = types.ModuleType("__main__")
    main_module.__file__ = os.path.abspath(path)
    with io.open_code(main_module.__file__) as file:
        code = compile(file.read(), main_module.__file__, "exec")
    sys.modules["__main__"] = main_module
    exec(code, vars(main_module))


if __name__ == "__main__":
    main()
