"""The launcher: our section of the config, the workers' command line, and the hook in `import torch`."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from rannc_hf.config import RanncConfig
from rannc_hf.integrations import launch as door
from tests.accelerate_config import TWO_CPU_PROCESSES

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "rannc_hf" / "run.py")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setattr("accelerate.commands.config.default_config_file", str(tmp_path / "none.yaml"))
    with mock.patch.dict(os.environ):
        for name in ("RANNC_CONFIG", "ACCELERATE_USE_CPU"):
            os.environ.pop(name, None)
        yield os.environ


@pytest.fixture
def config_file(tmp_path):
    def write(**settings):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**TWO_CPU_PROCESSES, **settings}))
        return str(path)

    return write


def launch(*command, **options):
    """What accelerate's launcher finds when it is started: arguments, config file and environment."""
    started = []

    def start(args):
        started.append((args, door._accelerate_config(args), dict(os.environ)))

    before = dict(os.environ)
    door.launch(launch_command_parser().parse_args(command), start, **options)
    assert dict(os.environ) == before
    (result,) = started
    return result


def options_in(environ):
    return RanncConfig.load(environ["RANNC_CONFIG"])


def test_section_goes_to_the_workers(config_file):
    path = config_file(rannc_config={"stages": 2, "microbatches": 4})
    args, config, environ = launch("--config_file", path, "train.py", "--lr", "1", "-m")
    assert (args.training_script, args.module) == (RUN, False)
    assert args.training_script_args == ["train.py", "--lr", "1", "-m"]
    assert config.num_processes == 2
    assert options_in(environ) == RanncConfig(stages=2, microbatches=4)
    assert environ["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize("section", [None, "auto", {}])
def test_empty_section_means_automatic(config_file, section):
    args, _, environ = launch("--config_file", config_file(rannc_config=section), "train.py")
    assert args.training_script == RUN
    assert options_in(environ) == RanncConfig()


def test_section_in_a_json_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TWO_CPU_PROCESSES, "rannc_config": {"stages": 3}}))
    _, _, environ = launch("--config_file", str(path), "train.py")
    assert options_in(environ).stages == 3


def test_without_a_section_nothing_changes(config_file, environment):
    args, _, environ = launch("--config_file", config_file(), "train.py", "x")
    assert (args.training_script, args.training_script_args) == ("train.py", ["x"])
    assert environ == environment


def test_modules(config_file):
    path = config_file(rannc_config="auto")
    args, _, _ = launch("--config_file", path, "-m", "package.train", "x")
    assert (args.training_script, args.module) == (RUN, False)
    assert args.training_script_args == ["-m", "package.train", "x"]
    args, _, _ = launch("--config_file", path, "-m", "rannc_hf.run", "train.py")
    assert (args.training_script, args.module, args.training_script_args) == ("rannc_hf.run", True, ["train.py"])


def test_gpus_are_left_to_accelerate(config_file):
    _, _, environ = launch("--config_file", config_file(use_cpu=False, rannc_config="auto"), "train.py")
    assert "ACCELERATE_USE_CPU" not in environ


def test_several_processes_on_cpu_by_flag():
    args, _, environ = launch("--cpu", "--num_processes", "2", "train.py", always=True)
    assert (args.cpu, args.multi_gpu) == (False, True)
    assert environ["ACCELERATE_USE_CPU"] == "true"


def test_options_come_from_one_place(config_file, environment, tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text("stages: 4\n")
    _, _, environ = launch("--config_file", config_file(), "train.py", options=str(options))
    assert options_in(environ).stages == 4
    environment["RANNC_CONFIG"] = '{"stages": 5}'
    args, _, environ = launch("--config_file", config_file(), "train.py")
    assert args.training_script == RUN
    assert options_in(environ).stages == 5
    with pytest.raises(ValueError, match=r"RANNC_CONFIG and from a `rannc_config:` section; keep one"):
        launch("--config_file", config_file(rannc_config={"stages": 2}), "train.py")


def test_mistakes_are_found_before_any_worker_starts(config_file):
    with pytest.raises(ValueError, match=r"unknown option `stagse`.*did you mean `stages`"):
        launch("--config_file", config_file(rannc_config={"stagse": 2}), "train.py")
    with pytest.raises(ValueError, match=r"unknown keys.*nonsense"):
        launch("--config_file", config_file(nonsense=1, rannc_config="auto"), "train.py")


@pytest.mark.parametrize(
    "settings, flags, reason",
    [
        ({"distributed_type": "FSDP"}, [], "FSDP is another way"),
        ({"distributed_type": "DEEPSPEED"}, [], "DeepSpeed is another way"),
        ({"distributed_type": "XLA"}, [], "XLA is not supported"),
        ({"distributed_type": "MULTI_CPU"}, [], "starts a single process; set `distributed_type: MULTI_GPU` and"),
        ({"distributed_type": "NO"}, [], "starts a single process"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, [], "torch.compile"),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, [], "ParallelismConfig is another way"),
        ({}, ["--use_fsdp"], "FSDP is another way"),
        ({}, ["--mixed_precision", "fp8"], "fp8"),
        ({}, ["--no_python"], "--no_python"),
    ],
)
def test_settings_of_accelerate_that_cannot_work(config_file, settings, flags, reason):
    with pytest.raises(ValueError, match=reason):
        launch("--config_file", config_file(rannc_config="auto", **settings), *flags, "train.py")


def run(*command, cwd=None, path=(), **environ):
    """Output and errors of a Python process that finds `path` first."""
    python_path = os.pathsep.join([*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": python_path, **environ}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_torch_is_told_of_the_hook():
    (hook,) = importlib.metadata.entry_points(group="torch.backends", name="rannc_hf")
    assert hook.value == "rannc_hf_autoload:autoload", "run the tests with the package installed (`make test`)"


BROKEN = {
    "raises": {"accelerate/__init__.py": "raise RuntimeError('broken')"},
    "lacks what we patch": {
        "accelerate/__init__.py": "",
        "accelerate/accelerator.py": "Accelerator = None",
        "accelerate/commands/__init__.py": "",
        "accelerate/commands/launch.py": "",
    },
}


@pytest.mark.parametrize("files", BROKEN.values(), ids=BROKEN)
def test_import_torch_survives_a_broken_accelerate(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    program = (
        "import sys, torch\n"
        "assert not {'accelerate', 'transformers'} & sys.modules.keys()\n"
        "try: import accelerate.accelerator, accelerate.commands.launch\n"
        "except RuntimeError as error: assert str(error) == 'broken'\n"
        "print(torch.ones(2).sum().item())\n"
    )
    result = run("-c", program, path=[tmp_path], RANNC_CONFIG="not an option")
    assert (result.returncode, result.stdout) == (0, "2.0\n"), result.stderr
    assert ("use `rannc launch` instead" in result.stderr) == ("accelerate/accelerator.py" in files)


@pytest.mark.parametrize("module", ["accelerate.commands.accelerate_cli launch", "accelerate.commands.launch"])
def test_hook_in_the_launcher(config_file, module):
    command = [*module.split(), "--config_file", config_file(rannc_config={"stagse": 2}), "no_such_script.py"]
    result = run("-m", *command)
    assert result.returncode != 0
    assert "unknown option `stagse`" in result.stderr
    assert "no_such_script.py" not in result.stderr, "a worker was started"


@pytest.mark.parametrize("first", ["torch", "accelerate"])
def test_plain_accelerator_in_a_worker_is_an_error(first):
    program = (
        f"import {first}\n"
        "from accelerate import Accelerator\n"
        "try: Accelerator()\n"
        "except RuntimeError as error: print(error)\n"
        "import os; del os.environ['RANNC_CONFIG']; Accelerator()\n"
    )
    result = run("-c", program, RANNC_CONFIG="auto", ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("RANNC_CONFIG is set, but") and "rannc launch" in result.stdout


SCRIPT = """
import json, sys
seen = {"argv": sys.argv, "path": sys.path, "file": __file__, "name": __name__, "package": __package__,
        "main": sys.modules["__main__"].__file__}
if sys.argv.pop(1) == "rannc":
    from accelerate import Accelerator
    assert Accelerator.is_rannc_accelerator
print(json.dumps(seen))
sys.exit(3)
"""


@pytest.mark.parametrize(
    "start, command",
    [([RUN], ["folder/train.py"]), (["-m", "rannc_hf.run"], ["-m", "folder.train"])],
    ids=["script", "module"],
)
def test_a_script_sees_what_it_sees_without_us(tmp_path, start, command):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.py").write_text(SCRIPT)
    plain = run(*command, "plain", "--flag", cwd=tmp_path)
    assert plain.returncode == 3, plain.stderr
    ours = run(*start, *command, "rannc", "--flag", cwd=tmp_path)
    assert ours.returncode == 3, ours.stderr
    assert json.loads(ours.stdout) == json.loads(plain.stdout)
