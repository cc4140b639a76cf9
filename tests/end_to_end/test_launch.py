"""Every way to start a run reaches the same entry point, and a user's error costs one sentence.

The launch is under test, not the training: most tests run a copy of the front end in which `train/loop.py` and
`train/start_checks.py` only report how they were called. No GPU, no process group, no network beyond
torchrun's own port.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "examples/pretrain_lrc.sh"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
# What a scheduler, or the process that runs these tests, may have set.
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "NNODES", "NODE_RANK", "GPUS_PER_NODE", "MASTER_", "MAX_", "SLURM_")
PROBE = """
import json, multiprocessing, os

def report(kind, config, **more):
    names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF")
    found = {name: os.environ.get(name) for name in names}
    path = os.path.join(config.checkpoint.save, f"{kind}-{found['RANK'] or 0}.json")
    with open(path, "w") as file:
        json.dump(found | {"seq_length": config.training.seq_length} | more, file)

def check(config, world_size):
    report("check", config, world_size=world_size)

def where(_):
    return __file__

def train(config, presets=()):
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # as the checkpoint writer does
        report("train", config, helper=pool.map(where, [0]))
"""

#: A training loop that only counts how often it was started, and fails.
FAILING = """
import os
from megatron_lrc.config import ConfigError, RunStopped

def train(config, presets=()):
    with open(os.path.join(config.checkpoint.save, "started"), "a") as file:
        file.write(os.environ["RANK"])
    raise {error}("the loss is not finite")
"""


def clean_environment(**values):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCH_VARIABLES)}
    own = ("PYTHONPATH", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "TORCHELASTIC_ERROR_FILE")
    for name in (*own, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        kept.pop(name, None)
    return kept | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | values


def run(command, *, cwd, **environment):
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def probe(tmp_path):
    """A copy of the launch script and the front end, with a training loop that reports instead of training."""
    root = tmp_path / "copy"
    (root / "examples").mkdir(parents=True)
    (root / "megatron_lrc/train").mkdir(parents=True)
    shutil.copy(ROOT / SCRIPT, root / SCRIPT)
    for name in ("__init__", "__main__", "console"):
        shutil.copy(ROOT / f"megatron_lrc/{name}.py", root / f"megatron_lrc/{name}.py")
    for name in ("commands", "config", "launch"):
        shutil.copytree(ROOT / f"megatron_lrc/{name}", root / f"megatron_lrc/{name}")
    (root / "megatron_lrc/train/__init__.py").touch()
    (root / "megatron_lrc/train/loop.py").write_text(PROBE)
    (root / "megatron_lrc/train/start_checks.py").write_text("from megatron_lrc.train.loop import check")
    return root


@pytest.fixture
def flags(tmp_path):
    """Flags of a run that passes validation, reporting into tmp_path/run."""
    teacher, run_directory = tmp_path / "teacher", tmp_path / "run"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    run_directory.mkdir()
    flags = ["--teacher", teacher, "--student-hidden-size", "8", "--save", run_directory, "--seq-length", "64"]
    return [*flags, "--train-iters", "0"]


def reports(flags, kind):
    files = sorted(Path(flags[5]).glob(f"{kind}-*.json"))
    return [json.loads(file.read_text()) for file in files]


WAYS = {
    "bash": ["bash"],
    "torchrun": [*TORCHRUN, "--nproc-per-node", "2"],
    "torchrun-no-python": [*TORCHRUN, "--nproc-per-node", "2", "--no-python"],
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_start_from_any_directory(way, probe, flags, tmp_path):
    result = run([*WAYS[way], probe / SCRIPT, *flags], cwd=tmp_path, GPUS_PER_NODE="2")
    assert result.returncode == 0, result.stderr
    started = reports(flags, "train")
    assert [(process["RANK"], process["WORLD_SIZE"]) for process in started] == [("0", "2"), ("1", "2")]
    for process in started:
        assert process["seq_length"] == 64
        assert process["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
        assert process["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
        # The script's own repository, not whatever megatron_lrc is installed; in helper processes too.
        assert process["helper"] == [str(probe / "megatron_lrc/train/loop.py")]


def test_bash_checks_first_and_shares_the_cores_among_the_processes(probe, flags, tmp_path):
    result = run(["bash", probe / SCRIPT, *flags], cwd=tmp_path, GPUS_PER_NODE="2")
    assert result.returncode == 0, result.stderr
    assert [checked["world_size"] for checked in reports(flags, "check")] == [2]
    threads = max(len(os.sched_getaffinity(0)) // 2, 1)
    assert {process["OMP_NUM_THREADS"] for process in reports(flags, "train")} == {str(threads)}


def test_bash_starts_one_process_without_gpus_and_keeps_what_is_set(probe, flags, tmp_path):
    given = {"OMP_NUM_THREADS": "3", "PYTORCH_ALLOC_CONF": "backend:native"}  # the allocator's newer name
    result = run(["bash", probe / SCRIPT, *flags], cwd=tmp_path, **given)
    assert result.returncode == 0, result.stderr
    (process,) = reports(flags, "train")
    assert (process["WORLD_SIZE"], process["OMP_NUM_THREADS"]) == ("1", "3")
    assert process["PYTORCH_CUDA_ALLOC_CONF"] is None


def test_bash_reports_a_users_error_in_one_sentence():
    result = run(
        ["bash", SCRIPT, "--teacher", "/no/such", "--student-hidden-size", "8", "--train-iters", "0", "--save", "run"],
        cwd=ROOT,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: --teacher /no/such is not a directory. Give a local Hugging Face directory; none is downloaded."
    ]


@pytest.mark.parametrize("way", ["torchrun", "torchrun-no-python"])
def test_torchrun_reports_a_users_error_and_quotes_it_as_the_root_cause(way):
    """torchrun prints its own traceback when a process fails; ours have none, and the sentence is its last word."""
    flags = ["--teacher", "/no/such", "--student-hidden-size", "8", "--train-iters", "0", "--save", "x"]
    result = run([*WAYS[way], SCRIPT, *flags], cwd=ROOT)
    sentence = "--teacher /no/such is not a directory. Give a local Hugging Face directory; none is downloaded."
    assert result.returncode != 0
    assert result.stderr.count(f"error: {sentence}") <= 1  # rank 0, unless torchrun ended it first
    assert sentence in result.stderr.partition("Root Cause")[2]
    assert "megatron_lrc/commands/" not in result.stderr


def test_every_error_is_listed_by_the_module_too():
    result = run([sys.executable, "-m", "megatron_lrc", "train", "--lr", "-1"], cwd=ROOT)
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) > 2 and all(line.startswith("error: ") for line in lines)


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_a_question_is_answered_once(flag):
    for command in (["bash", SCRIPT, flag], [sys.executable, "-m", "megatron_lrc", "train", flag]):
        result = run(command, cwd=ROOT, GPUS_PER_NODE="2")
        assert result.returncode == 0 and result.stderr == ""
        assert result.stdout.count("usage:" if flag == "--help" else "megatron_lrc 0.") == 1


def test_an_unknown_command_is_refused():
    result = run([sys.executable, "-m", "megatron_lrc", "trian"], cwd=ROOT)
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown command 'trian'") and result.stderr.count("\n") == 1


# ------------------------------------------------------------------------------ what bash asks torchrun for


@pytest.fixture
def torchrun_arguments(tmp_path):
    """The script with an interpreter that prints its arguments, a cluster's scontrol, a GPU node's nvidia-smi."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    programs = {
        "python": 'if [[ $3 == check ]]; then exit 0; fi; echo "$@"',
        "scontrol": "printf 'node7\\nnode8\\nnode9\\n'",
        "nvidia-smi": "printf 'GPU 0: A\\nGPU 1: A\\nGPU 2: A\\nGPU 3: A\\n'",
    }
    for name, body in programs.items():
        (bin_directory / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_directory / name).chmod(0o755)

    def start(*flags, **environment):
        full = clean_environment(**{"PYTHON": str(bin_directory / "python"), **environment})
        full["PATH"] = f"{bin_directory}:{full['PATH']}"
        if "CUDA_VISIBLE_DEVICES" not in environment:
            full.pop("CUDA_VISIBLE_DEVICES")
        command = ["bash", SCRIPT, "--lr", "1", *flags]
        return subprocess.run(command, cwd=ROOT, env=full, capture_output=True, text=True, timeout=20)

    return start


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "--standalone --local-addr 127.0.0.1 --nproc-per-node 4"),  # all that nvidia-smi lists
        ({"CUDA_VISIBLE_DEVICES": "1,3"}, "--standalone --local-addr 127.0.0.1 --nproc-per-node 2"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "--standalone --local-addr 127.0.0.1 --nproc-per-node 1"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "GPUS_PER_NODE": "8"},
            "--nnodes 2 --node-rank 1 --master-addr first --master-port 29500 --nproc-per-node 8",
        ),
        (
            {
                "SLURM_JOB_NUM_NODES": "3",
                "SLURM_NODEID": "2",
                "SLURM_JOB_NODELIST": "node[7-9]",
                "SLURM_GPUS_ON_NODE": "8",
                "SLURM_JOB_ID": "1234567",
                "SLURM_LOCALID": "0",
            },
            "--nnodes 3 --node-rank 2 --master-addr node7 --master-port 24567 --nproc-per-node 8",
        ),
    ],
)
def test_nodes_and_processes_come_from_the_environment(torchrun_arguments, environment, expected):
    result = torchrun_arguments(**environment)
    assert result.stderr == ""
    assert result.stdout.strip() == f"-m torch.distributed.run {expected} --max-restarts 0 -m megatron_lrc train --lr 1"


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        (["--load", "auto"], {}, "3"),
        (["--load=auto"], {}, "3"),
        (["--load", "auto"], {"MAX_RESTARTS": "0"}, "0"),
        (["--load", "auto-mated"], {}, "0"),
        ([], {"MAX_RESTARTS": "12"}, "12"),
    ],
)
def test_a_run_that_loads_what_it_finds_is_started_again(torchrun_arguments, flags, environment, expected):
    result = torchrun_arguments(*flags, **environment)
    assert f"--max-restarts {expected} -m megatron_lrc train --lr 1" in result.stdout


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NNODES": "2"}, "error: NNODES is 2 but MASTER_ADDR is not set."),
        ({"GPUS_PER_NODE": "all"}, "error: GPUS_PER_NODE is 'all'"),
        ({"MAX_RESTARTS": "-1"}, "error: MAX_RESTARTS is '-1'"),
        ({"LAUNCHER": "mpirun"}, "error: LAUNCHER is 'mpirun'; it must be torchrun or ft_launcher."),
        ({"LAUNCHER": "ft_launcher", "PYTHON": "false"}, "error: LAUNCHER is ft_launcher, whose package is missing"),
        ({"SLURM_LOCALID": "1"}, "error: Slurm started several tasks on this node"),
    ],
)
def test_an_environment_that_cannot_work_is_refused(torchrun_arguments, environment, expected):
    result = torchrun_arguments(**environment)
    assert result.returncode == 2
    assert result.stderr.startswith(expected) and result.stderr.count("\n") == 1


def test_the_script_is_valid_bash_and_valid_python():
    script = ROOT / SCRIPT
    assert subprocess.run(["bash", "-n", script], timeout=20).returncode == 0
    compile(script.read_text(), SCRIPT, "exec")
    assert os.access(script, os.X_OK)


# ------------------------------------------------------------------------------ starting again


@pytest.mark.parametrize(
    ("error", "times"), [("RunStopped", 1), ("ConfigError", 1), ("ArithmeticError", 3)], ids=lambda value: str(value)
)
def test_only_what_may_end_otherwise_is_started_again(probe, flags, tmp_path, error, times):
    (probe / "megatron_lrc/train/loop.py").write_text(FAILING.format(error=error))
    way = [*TORCHRUN, "--nproc-per-node", "1", "--max-restarts", "2"]
    result = run([*way, probe / SCRIPT, *flags], cwd=tmp_path)
    assert result.returncode != 0
    assert Path(flags[5], "started").read_text() == "0" * times
    assert "the loss is not finite" in result.stderr.partition("Root Cause")[2]
    assert ("Traceback" in result.stderr.partition("Root Cause")[2]) == (error == "ArithmeticError")
