"""tools/benchmark.py export: what it exports is a student like any other, and its ratios follow from its figures."""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import export_benchmark as export
from benchmarks import saved_run
from benchmarks.export_benchmark import Copied, Exported, Round, Sizes
from benchmarks.measure import Measured
from hf_teachers import WRITERS
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.methods.ordinary.initial_weights import InitialWeights
from tools_path import convert_to_hf, load_tool

benchmark = load_tool("benchmark").main


def row_of(out: str, name: str) -> str:
    (row,) = re.findall(rf"^{re.escape(name)}  .*$", out, re.M)
    return row


def test_the_run_that_is_made_can_be_exported_and_verified(tiny_llama, tmp_path, capsys):
    """And holds Adam's state: its files are larger than the projections and gains by more than twice."""
    run, output = tmp_path / "run", tmp_path / "export"
    flags = ["--teacher", tiny_llama(), "--student-hidden-size", "24", "--seq-length", "16", "--save", str(run)]
    assert saved_run.main(flags) == 0
    assert convert_to_hf(["--load", str(run), "--output", str(output)]) == 0
    assert "hidden size 24, step 1" in capsys.readouterr().out
    trained = 4 * 24 * ((2 * 7 + 2) * 48 + 2 * 2 + 1)
    assert export.total_bytes(run.glob("iter_*/*.distcp")) > 3 * trained


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_a_random_teacher_is_written_as_its_weights_are(writer, tmp_path):
    writer(tmp_path / "given")
    description = describe_teacher(tmp_path / "given")
    random = InitialWeights(description, description.shape, std=0.02, seed=0)
    export.write_teacher(random, tmp_path / "teacher", torch.float32)
    written = open_teacher(describe_teacher(tmp_path / "teacher"))
    pairs = zip(export.all_weights(random), export.all_weights(written), strict=True)
    assert all(one == other and torch.equal(first, second) for (one, first), (other, second) in pairs)
    assert written.description.family == description.family
    AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")


def test_a_copy_has_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_PIECE", 1000)
    (tmp_path / "given").mkdir()
    for name, size in (("a", 0), ("b", 1000), ("c", 2345)):
        (tmp_path / "given" / name).write_bytes(bytes(i % 251 for i in range(size)))
    copied = export.copy_files(tmp_path / "given", tmp_path / "copy")
    for path in (tmp_path / "given").iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
    assert min(copied.read, copied.write, copied.flush) > 0
    assert copied.seconds == copied.read + copied.write + copied.flush


def test_ratios_bounds_and_parts_follow_from_what_was_measured():
    """A round of easy numbers: an export of 5 s with 1 s of fsync beside a copy of 2 s."""
    copy = Copied(read=0.25, write=0.75, flush=1.0)
    plain, verified = (Measured(seconds, 0.0, peak, peak) for seconds, peak in ((5.0, 1_250_000_000), (9.0, 2 * 10**9)))
    one = Round(start=3.0, plain=Exported(plain, 1.0, copy), verified=Exported(verified, 0.5, copy))
    sizes = Sizes(exported=900, largest_shard=10**9, num_shards=2, checkpoint=1, teacher=1)
    out = "\n".join(export.summary([one], sizes))
    assert row_of(out, "copy: read, write, fsync").split()[4:6] == ["2.000", "(2.000-2.000)"]
    assert row_of(out, "export --no-verify, and fsync").split()[4::2] == ["6.00", "3.00", "1.25"]
    assert row_of(out, "export, and fsync").split()[3::2] == ["9.50", "4.75", "2.00"]
    assert row_of(out, "target: at most").split()[3:] == ["3", "2.50"]
    assert " 1.50 (" in row_of(out, "export --no-verify without its start")
    seconds = {"start of Python, imports": 3, "reading checkpoint and teacher, composing (the rest)": 1.25}
    seconds |= {"writing, as long as the copy writes": 0.75, "fsync": 1, "verifying": 4}
    assert sum(seconds.values()) == 10
    for name, value in seconds.items():
        assert f" {value:.3f} (" in row_of(out, name) and f" {value / 10:.3f} (" in row_of(out, name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--student-hidden-size", "0"], "--student-hidden-size 0: expected is a number from 1."),
        (["--student-hidden-size", "24", "--repeats", "0"], "--repeats 0: expected is a number from 1."),
        (["--student-hidden-size", "24", "--folder", "/none"], "No such file or directory"),
    ],
)
def test_errors_are_one_line(flags, message, tiny_llama, capsys):
    teacher = tiny_llama()
    capsys.readouterr()
    assert benchmark(["export", "--teacher", teacher, *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_table_and_the_json_of_a_measurement_agree(tiny_llama, tmp_path):
    """The program as a user starts it, without a teacher's weights; nothing is left behind."""
    file = tmp_path / "figures.json"
    program = [sys.executable, str(Path(__file__).parents[2] / "tools" / "benchmark.py"), "export"]
    flags = ["--teacher-config", tiny_llama() + "/config.json", "--student-hidden-size", "24", "--bf16"]
    flags += ["--repeats", "2", "--folder", str(tmp_path), "--json", str(file)]
    done = subprocess.run([*program, *flags], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    ratios = []
    for each in figures["rounds"]:
        plain = each["plain"]
        ratios.append((plain["program"]["seconds"] + plain["flush"]) / sum(plain["copy"].values()))
        assert each["verified"]["program"]["peak_rss"] > plain["program"]["peak_rss"] > 100e6
        assert plain["program"]["seconds"] > each["start"] / 2 > 0.1
    assert f" {median(ratios):,.2f} (" in row_of(done.stdout, "export --no-verify, and fsync")
    assert figures["bytes"]["largest_shard"] < figures["bytes"]["exported"]
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
