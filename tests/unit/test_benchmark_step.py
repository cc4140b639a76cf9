"""`benchmark.py step`: table and JSON agree; contestants that compute something else are reported."""

import json
import re

import pytest

from hf_teachers import write_llama
from megatron_lrc.benchmarks import naive
from tools_path import load_tool

benchmark = load_tool("benchmark").main


def flags(teacher: str) -> list[str]:
    return [
        "step",
        "--teacher",
        teacher,
        "--student-hidden-size",
        "16",
        "--seq-length",
        "32",
        "--num-microbatches",
        "2",
    ]


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_the_table_the_json_and_equal_losses(tmp_path, capsys, is_tied):
    write_llama(tmp_path / "teacher", is_tied=is_tied)
    teacher = str(tmp_path / "teacher")
    assert benchmark([*flags(teacher), "--repeats", "2", "--json", str(tmp_path / "s.json")]) == 0
    out = capsys.readouterr().out
    figures = json.loads((tmp_path / "s.json").read_text())
    assert list(figures["rounds"]) == ["lrc", "naive", "ordinary", "peak"] and figures["difference"] < 1e-4
    for name in ("lrc", "naive", "ordinary"):
        (middle,) = re.findall(rf"^{name} +([0-9.]+) \(", out, re.M)
        seconds = figures["rounds"][name]["seconds"]
        assert float(middle) == pytest.approx(sum(seconds) / 2, abs=0.006)
    lrc, ordinary = (figures["rounds"][name]["seconds"] for name in ("lrc", "ordinary"))
    ratios = sorted(b / a for a, b in zip(lrc, ordinary, strict=True))
    assert f"LRC / ordinary: {sum(ratios) / 2:.3f} ({ratios[0]:.3f}-{ratios[1]:.3f})" in out


def test_a_naive_form_that_computes_something_else_is_reported(tmp_path, capsys, monkeypatch):
    losses = naive.NaiveClone._losses
    monkeypatch.setattr(
        naive.NaiveClone, "_losses", lambda self, batch: (*losses(self, batch)[:2], 2 * losses(self, batch)[2])
    )
    write_llama(tmp_path / "teacher", is_tied=True)
    teacher = str(tmp_path / "teacher")
    assert benchmark([*flags(teacher), "--repeats", "1", "--contestants", "naive"]) == 1
    assert "losses in the same step: 1.0e+00" in capsys.readouterr().out


def test_errors_are_one_sentence(tmp_path, capsys):
    write_llama(tmp_path / "teacher", is_tied=True)
    teacher = str(tmp_path / "teacher")
    for extra, message in (
        (["--contestants", "lrc,other"], "--contestants other: expected are some of lrc,ordinary,naive."),
        (["--num-microbatches", "0"], "--num-microbatches 0: expected is a number from 1."),
        (["--seq-length", "0"], "--seq-length is 0; it must be at least 1."),
    ):
        assert benchmark([*flags(teacher), *extra]) == 2
        assert message in capsys.readouterr().err
