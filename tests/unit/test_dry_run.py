"""--dry-run accepts the published runs for teachers of full size, says what they take, and refuses what cannot be.

The teachers are real but for their values (`full_size_teachers.py`); nothing here needs a GPU or more than a little
memory and disk.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lrc.commands.main import main
from megatron_lrc.config import PUBLISHED_RUNS
from megatron_lrc.estimate.published_teachers import TEACHER_SHAPES
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.train import dry_run as training
from tiny_data import write_dataset

ROOT = Path(__file__).parents[2]
#: As their model cards give them.
BILLIONS = {
    "Llama-3.2-3B-Instruct": "3.21",
    "Qwen2.5-3B-Instruct": "3.09",
    "Qwen2.5-7B-Instruct": "7.62",
    "Llama-2-7b-chat": "6.74",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    tokens = [number % 64 + 100 for number in range(2100)]
    return write_dataset(tmp_path_factory.mktemp("data") / "text", [tokens] * 200)


@pytest.fixture
def dry_run(full_size_teachers, data, tmp_path, capsys, monkeypatch):
    """`dry_run(preset, *flags)` -> (exit code, stdout, stderr's errors). With room for checkpoints of any size, unless
    another place than the usual one is given for them."""
    measured = training.free_space
    usual = tmp_path / "run"
    monkeypatch.setattr(training, "free_space", lambda run: 1e13 if run == str(usual) else measured(run))

    def run(preset: str, *flags: str, save: Path = usual) -> tuple[int, str, list[str]]:
        teacher = full_size_teachers / PUBLISHED_RUNS[preset][0]
        common = ["--teacher", str(teacher), "--data-path", data, "--split", "90,10,0", "--save", str(save)]
        code = main(["train", "--preset", preset, *common, *flags])
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("error:")]

    return run


def number_after(pattern: str, text: str) -> float:
    match = re.search(pattern + r"\s*([0-9.e+]+)", text)
    assert match, (pattern, text)
    return float(match[1])


def hours(text: str) -> float:
    """Of the line `time: 7.3 hours for ...`."""
    unit = {"minutes": 1 / 60, "hours": 1, "days": 24}[text.partition("\ntime: ")[2].split()[1]]
    return number_after("\ntime:", text) * unit


@pytest.mark.parametrize("name", TEACHER_SHAPES)
def test_the_shapes_known_by_name_are_those_of_the_teachers(full_size_teachers, name):
    assert describe_teacher(full_size_teachers / name).shape == TEACHER_SHAPES[name]


@pytest.mark.parametrize("preset", PUBLISHED_RUNS)
def test_every_published_run_is_accepted_for_eight_gpus(dry_run, tmp_path, preset):
    teacher, tokens = PUBLISHED_RUNS[preset]
    code, out, errors = dry_run(preset, "--keep-last", "1", "--dry-run", "8")
    assert (code, errors) == (0, []), out
    assert f"teacher: {BILLIONS[teacher]}B parameters" in out
    student = number_after("student:", out)
    assert student == pytest.approx(float(preset.removeprefix("lrc-").removesuffix("b")), rel=0.12)
    assert ("TP 2 with sequence parallel x PP 1 x DP 4" if preset == "lrc-4b" else "TP 1 x PP 1 x DP 8 on 8") in out
    assert number_after("\ntraining:", out) == float(tokens.removesuffix("B"))
    per_token = [
        number_after(f"\n  {part}", out) for part in ("teacher forward", "student forward", "student backward")
    ]
    # 2 FLOPs for each parameter of a pass, but for attention (up) and embeddings (down); and the student's attention
    # goes through the teacher's o, which is frozen.
    shape = TEACHER_SHAPES[teacher]
    through = 2e-9 * shape.num_layers * shape.num_attention_heads * shape.head_dim * shape.hidden_size
    passes = (2 * float(BILLIONS[teacher]), 2 * student + through, 4 * student + through)
    for flops, expected in zip(per_token, passes, strict=True):
        assert flops == pytest.approx(expected * 1e9, rel=0.35)
    assert 20 < number_after("\n  total", out.partition("memory per GPU")[2]) < 79
    assert "(assumed; --mfu)" in out and 2 < hours(out) < 240
    assert f"--share-compose, for the {4 if preset == 'lrc-4b' else 8} replicas of a node: a step would take " in out
    assert 5 < number_after(r"\n--share-compose[^(]*\(", out) < 12  # percent faster
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_flags_make_of_a_preset(dry_run):
    _, out, _ = dry_run("lrc-4b", "--global-batch-size", "256", "--keep-last", "1", "--dry-run", "64")
    lines = out.splitlines()
    assert "training: 18B tokens in 34,333 steps of 524,288 tokens" in lines
    assert (
        "warning: --global-batch-size 256 where lrc-4b has 16: 34,333 steps instead of 549,317; the --lr 0.0001 of "
        "lrc-4b was published for a batch of 16"
    ) in lines
    assert re.search(r"^time: [0-9.]+ (hours|days) for 34,333 steps, ", out, re.MULTILINE), out
    _, out, _ = dry_run("lrc-1.5b", "--train-iters", "1000", "--keep-last", "1", "--dry-run", "8")
    assert "warning: --train-iters 1000 is 49.2M tokens; --preset lrc-1.5b trains 10B" in out.splitlines()
    warned = [
        line for line in dry_run("lrc-1.5b", "--keep-last", "1", "--dry-run", "8")[1].splitlines() if "warning" in line
    ]
    assert [line for line in warned if "all zero" not in line] == []  # these teachers are files of zeros


def test_a_batch_that_does_not_fit_is_answered_with_those_that_do(dry_run):
    _, _, (error,) = dry_run("lrc-4b", "--dry-run", "64")
    assert error == (
        "error: --global-batch-size 16 is not divisible by --micro-batch-size 2 times 32 data-parallel replicas. Use "
        "--global-batch-size 64 (137,330 steps), instead of 549,317 steps; the --lr 0.0001 of lrc-4b was published for "
        "a batch of 16."
    )
    _, _, (error,) = dry_run("lrc-4b", "--train-iters", "1000", "--lr", "1e-3", "--dry-run", "10")
    assert error.endswith("Use --global-batch-size 10 (20.5M tokens) or 20 (41M tokens), instead of 32.8M tokens.")


def test_where_smaller_micro_batches_fit_the_batch_stays(dry_run):
    """24 sequences of lrc-1.5b, in micro-batches of 3, on 12 GPUs."""
    _, _, (error,) = dry_run("lrc-1.5b", "--dry-run", "12")
    assert error.endswith("--micro-batch-size 3 times 12 data-parallel replicas. Use --micro-batch-size 2.")


def test_a_dry_run_is_for_the_processes_that_would_run_now_unless_told_otherwise(dry_run, monkeypatch):
    assert "DP 1 on 1 GPUs" in dry_run("lrc-1.5b", "--dry-run")[1]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "DP 4 on 4 GPUs" in dry_run("lrc-1.5b", "--dry-run")[1]
    assert "DP 2 on 2 GPUs" in dry_run("lrc-1.5b", "--dry-run=2")[1]


def test_memory_and_time_follow_the_layout_and_the_gpu(dry_run):
    def total(*flags: str) -> float:
        flags = ("--micro-batch-size", "1", *flags)
        _, out, _ = dry_run("lrc-4b", "--dry-run", "8", *flags)  # printed also where it is too much
        return number_after("\n  total", out.partition("memory per GPU")[2])

    tp, pp = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
    alone = total(tp, "1")
    assert total(tp, "4", "--sequence-parallel") < 0.5 * alone
    assert total(tp, "1", pp, "4") < 0.6 * alone
    assert total(tp, "1", "--no-use-distributed-optimizer") > alone + 10
    time = [hours(dry_run("lrc-4b", "--dry-run", "8", "--mfu", mfu)[1]) for mfu in ("0.2", "0.4")]
    assert time[0] == pytest.approx(2 * time[1], rel=0.1)


def test_the_time_of_a_short_run_is_not_0_days(dry_run):
    _, out, _ = dry_run("lrc-1.5b", "--keep-last", "1", "--dry-run", "8", "--train-iters", "3000")
    assert re.search(r"^time: \d+ minutes for 3,000 steps, ", out, re.MULTILINE), out


def test_what_cannot_run_is_refused_in_one_sentence_each(dry_run):
    for flags, expected in (
        (("--dry-run", "64"), "--global-batch-size 24 is not divisible by --micro-batch-size 3 times 64 "),
        (("--dry-run", "many"), "--dry-run many is not a number of GPUs."),
        (("--dry-run", "0"), "--dry-run 0 is not a number of GPUs."),
        (("--dry-run", "8", "--mfu", "35"), "--mfu 35 is not a share of the GPUs' peak"),
        (("--dry-run", "8", "--gpu", "H1000"), "--gpu H1000 is not known; expected is one of H100-80GB, "),
        (("--dry-run", "8", "--gpu", "A100-40GB", "--micro-batch-size", "3"), "An estimated "),
        (("--dry-run", "8", "--pipeline-model-parallel-size", "8"), "--pipeline-model-parallel-size 8 does not divide"),
        (("--gpu", "H100-80GB", "--help-me"), "unknown flag --gpu"),
    ):
        code, _, errors = dry_run("lrc-1.5b", *flags)
        assert code == 2 and errors[0].startswith(f"error: {expected}"), (flags, errors)


def test_a_disk_that_holds_no_checkpoint_is_refused(dry_run, small_disk):
    code, out, (error,) = dry_run("lrc-1.5b", "--dry-run", "8", save=small_disk / "run")
    assert code == 2 and "has 0.00 GB free, and a checkpoint takes 13.02 GB" in error
    assert "every check passed" not in out


def test_checkpoints_are_counted_as_they_are_kept(dry_run):
    for flags, count in (((), 102), (("--keep-last", "3"), 3), (("--save-retain-interval", "100000"), 3)):
        assert f"; {count} kept and one being written" in dry_run("lrc-1.5b", "--dry-run", "8", *flags)[1]


def test_the_launch_script_passes_a_dry_run_on_with_its_number_of_processes(full_size_teachers, data, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "SLURM_"))}
    result = subprocess.run(
        [
            "bash",
            "examples/pretrain_lrc.sh",
            "--preset",
            "lrc-1.5b",
            "--teacher",
            full_size_teachers / "Llama-3.2-3B-Instruct",
        ]
        + ["--data-path", data, "--split", "90,10,0", "--save", tmp_path / "run", "--keep-last", "1", "--dry-run"]
        + ["--student-hidden-size", "128"],  # whose checkpoints any disk has room for
        cwd=ROOT,
        env=kept | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "NNODES": "2", "GPUS_PER_NODE": "4"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert "DP 8 on 8 GPUs" in result.stdout and "nothing was started" in result.stdout
