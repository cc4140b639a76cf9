"""The batch script, with a cluster of one node that is a handful of shell lines in place of Slurm's programs.

`srun` starts the task as Slurm does (its output into the file, one task on node 0), `scontrol requeue` takes a note.
The runs are real, of tiny models on CPU, but where only the script's own decisions are under test.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/slurm_pretrain_lrc.sbatch"
SRUN = """
for word in "$@"; do
    case $word in
        --output=*) exec >"${word#--output=}" 2>&1; shift ;;
        --*) shift ;;
        *) break ;;
    esac
done
echo "asked for: $*"
export SLURM_NODEID=0 SLURM_LOCALID=0
"""
REAL_SRUN = SRUN + 'exec "$@"\n'
FAKE_SRUN = SRUN + 'echo "$LAST_WORDS"; exit "${SRUN_CODE:-0}"\n'
SCONTROL = 'if [[ $1 == requeue ]]; then echo "$2" >>"$REQUEUED"; fi\n'

Submit = Callable[..., subprocess.Popen]


@pytest.fixture
def submit(tmp_path) -> Submit:
    """`submit(flags, srun=..., **environment)` -> the batch script's process, as Slurm would start it."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def start(flags: list[str], *, srun: str = REAL_SRUN, **environment: str) -> subprocess.Popen:
        for name, body in {"srun": srun, "scontrol": SCONTROL}.items():
            (programs / name).write_text(f"#!/usr/bin/env bash\n{body}")
            (programs / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "SLURM_"))}
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1"}
        job |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "1", "REQUEUED": str(tmp_path / "requeued")}
        paths = {"PATH": f"{programs}:{kept['PATH']}", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            ["bash", str(SCRIPT), *flags],
            env=kept | job | paths | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def ended(job: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) when it has ended."""
    try:
        out, err = job.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise
    return job.returncode, out, err


def requeued(folder: Path) -> list[str]:
    path = folder / "requeued"
    return path.read_text().split() if path.exists() else []


def last_step(run: Path) -> int:
    try:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


@pytest.mark.slow
def test_a_run_whose_time_is_up_saves_is_queued_again_and_goes_on_to_its_end(tiny_llama, tiny_text, tmp_path, submit):
    run = tmp_path / "run"
    flags = ["--teacher", tiny_llama(), "--student-hidden-size", "24", "--data-path", tiny_text, "--split", "90,10,0"]
    flags += ["--save", str(run), "--seq-length", "16", "--eval-iters", "0", "--log-interval", "1"]
    job = submit([*flags, "--train-iters", "1000000"])
    deadline = time.monotonic() + 90
    while job.poll() is None and last_step(run) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    code, out, err = ended(job)
    assert code == 0, err
    assert "back into the queue" in out and requeued(tmp_path) == ["7"]
    assert not (run / "stop").exists()
    (checkpoint,) = run.glob("iter_*")
    saved = json.loads((checkpoint / "run.json").read_text())["state"]["step"]
    assert saved >= 3

    (run / "stop").touch()  # left by a job that was killed before it could obey
    code, out, err = ended(submit([*flags, "--train-iters", str(saved + 2)], SLURM_RESTART_COUNT="1"))
    assert code == 0 and out.splitlines()[-1] == "complete", err
    assert requeued(tmp_path) == ["7"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, saved + 3))


def test_the_run_is_told_when_to_stop_and_to_go_on_from_what_there_is(tmp_path, submit):
    words = "stopped at step 5 of 10: --exit-duration-in-mins; go on with --load r"
    environment = {"LAST_WORDS": words, "SLURM_JOB_END_TIME": str(int(time.time()) + 30 * 60 + 30)}
    code, out, _ = ended(submit(["--save", str(tmp_path / "r"), "--lr", "1"], srun=FAKE_SRUN, **environment))
    assert code == 0 and words in out and requeued(tmp_path) == ["7"]
    asked = (tmp_path / "r/slurm-7-0.out").read_text().splitlines()[0]
    expected = f"--save {tmp_path / 'r'} --lr 1 --load auto --exit-duration-in-mins 20"
    assert asked == f"asked for: bash examples/pretrain_lrc.sh {expected}"
    ended(submit([f"--save={tmp_path / 'r'}", "--load=other"], srun=FAKE_SRUN, MARGIN_MINUTES="25", **environment))
    asked = (tmp_path / "r/slurm-7-0.out").read_text().splitlines()[0]
    assert asked.endswith(f"--save={tmp_path / 'r'} --load=other --exit-duration-in-mins 5")


@pytest.mark.parametrize(
    ("environment", "code", "said"),
    [
        ({"LAST_WORDS": "step 10 | loss 1"}, 0, "complete"),
        ({"LAST_WORDS": "stopped at step 5 of 10: the file stop; go on with --load r"}, 0, "the file stop"),
        (
            {"LAST_WORDS": "stopped at step 5 of 10: SIGTERM", "SRUN_CODE": "1"},
            1,
            "error: the run ended with exit code 1",
        ),
        ({"LAST_WORDS": "error: --lr is 0", "SRUN_CODE": "2"}, 2, "error: the run ended with exit code 2"),
        (
            {
                "LAST_WORDS": "stopped at step 5 of 10: --exit-duration-in-mins",
                "SLURM_RESTART_COUNT": "3",
                "MAX_REQUEUES": "3",
            },
            2,
            "error: The run is not complete after 3 requeues. Submit it again.",
        ),
    ],
    ids=["complete", "stopped by the user", "preempted", "a user's error", "too often"],
)
def test_nothing_else_is_queued_again(tmp_path, submit, environment, code, said):
    found, out, err = ended(submit(["--save", str(tmp_path / "run")], srun=FAKE_SRUN, **environment))
    assert found == code and said in out + err and requeued(tmp_path) == []


def test_what_cannot_be_submitted_is_refused_in_one_sentence(tmp_path, submit):
    late = {"SLURM_JOB_END_TIME": str(int(time.time()) + 300)}
    for flags, environment, expected in (
        (["--lr", "1"], {}, "error: --save is missing"),
        (["--save", "r"], {"SLURM_JOB_ID": ""}, "error: This is a batch script. Submit it: sbatch "),
        (
            ["--save", "r"],
            {"SLURM_SUBMIT_DIR": str(tmp_path)},
            f"error: {tmp_path} is not the repository of megatron_lrc",
        ),
        (["--save", str(tmp_path / "r")], late, "error: The time limit leaves nothing but the margin of 10 minutes."),
    ):
        code, _, err = ended(submit(flags, srun=FAKE_SRUN, LAST_WORDS="", **environment))
        assert code == 2 and err.startswith(expected) and err.count("\n") == 1, err
