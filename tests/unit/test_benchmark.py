"""tools/benchmark.py: what it says of the contestants is so, and what differs is said."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_data
from benchmarks import corpus
from benchmarks import data_benchmark as data
from benchmarks import head_benchmark as head
from benchmarks import start_benchmark as start
from benchmarks.measure import Spread, measure, table
from hf_teachers import write_llama
from megatron_lrc.config import ConfigError
from tools_path import load_tool

benchmark = load_tool("benchmark").main


@pytest.mark.slow
def test_the_table_the_json_and_the_equal_outputs(tokenizer_folder, tmp_path, capsys):
    """300 KB of this environment's text, Megatron-LM's pattern and ours."""
    flags = ["--corpus-mb", "0.3", "--repeats", "1", "--check-documents", "20", "--json", str(tmp_path / "b.json")]
    assert benchmark(["data", "--tokenizer-model", tokenizer_folder, *flags]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"corpus: 0\.[345]\d? MB of text in \d+ documents .* 100\.0% in distinct documents, .*, from the files of", out
    )
    assert ".bin of all contestants: byte-identical" in out and ".idx of all contestants: byte-identical" in out
    assert "tokens equal to transformers' tokenizer: 20 of 20 random documents" in out
    figures = json.loads((tmp_path / "b.json").read_text())
    assert figures["byte_identical"] == {"bin": True, "idx": True}
    assert figures["checked"] == {"documents": 20, "equal": 20}
    assert list(figures["contestants"]) == [data.BASELINE, *data.OURS]
    for name, spreads in figures["contestants"].items():
        (row,) = re.findall(rf"^{re.escape(name)}  .*$", out, re.M)
        rate, seconds = spreads["text_mb_per_second"]["median"], spreads["seconds"]["median"]
        assert f"{rate:,.2f} (" in row and f"{spreads['peak_rss_mb']['median']:,.0f} (" in row
        assert rate * seconds == pytest.approx(figures["corpus"]["text_bytes"] / 1e6)
        assert spreads["peak_rss_mb"]["median"] > 20 and spreads["cpu_seconds"]["median"] > 0
        baseline = figures["contestants"][data.BASELINE]["seconds"]["median"]
        assert spreads["ratio"]["median"] == pytest.approx(baseline / seconds)


@pytest.mark.slow
def test_a_contestant_that_writes_other_tokens_is_reported(tokenizer_folder, tmp_path, monkeypatch, capsys):
    """Ours is kept from ending its documents: neither the files nor the checked documents agree then."""
    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", tiny_data.make_texts(30))
    contestants = data.make_contestants()[:2]
    contestants[1].command.remove("--append-eod")
    monkeypatch.setattr(data, "make_contestants", lambda: contestants)
    flags = ["--input", source, "--repeats", "1", "--check-documents", "5"]
    assert benchmark(["data", "--tokenizer-model", tokenizer_folder, *flags]) == 1
    out = capsys.readouterr().out
    assert ".bin of all contestants: DIFFERENT" in out and ": 0 of 5 random documents" in out


def test_errors_are_one_sentence(tokenizer_folder, tmp_path, capsys):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "word1"}\n{"text": 3}\n')
    for flags, message in (
        (["--input", str(source)], f"{source}:2 is not a JSON object with text"),
        (["--input", str(tmp_path / "none.jsonl")], "No such file"),
        (["--repeats", "0"], "--repeats and --corpus-mb take numbers above 0"),
    ):
        assert benchmark(["data", "--tokenizer-model", tokenizer_folder, *flags]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_contestant_that_fails_is_quoted_in_one_sentence(tmp_path, capsys):
    assert benchmark(["data", "--corpus-mb", "0.01", "--tokenizer-model", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "ended with exit code 1: " in err and err.count("\n") == 1


def test_repeated_text_is_told_from_distinct_text(tmp_path, monkeypatch):
    texts = [f"{word}\n" * 3 + "end" for word in ("one", "two")]
    monkeypatch.setattr(corpus, "_environment_texts", lambda: iter(texts))
    path = tmp_path / "c.jsonl"
    corpus.write_corpus(path, 4 * sum(map(len, texts)))
    lines = path.read_text().splitlines()
    found = corpus.read_corpus([str(path)])
    assert len(lines) == 8 and len(set(lines)) > 2
    assert (found.num_bytes, found.distinct_bytes) == (4 * sum(map(len, texts)), sum(map(len, texts)))
    assert "25.0% in distinct documents" in found.describe()


def test_files_that_are_nearly_alike_count_for_their_difference(tmp_path):
    texts = ["same line\nsame line\nfirst\n", "same line\nother\n"]
    found = corpus.read_corpus([tiny_data.write_jsonl(tmp_path / "a.jsonl", texts)])
    assert (found.num_bytes, found.distinct_bytes) == (42, 42)
    assert found.fresh_line_bytes == len("same line\nfirst\nother\n")


def test_the_environments_text_is_the_same_twice_and_holds_no_file_twice(tmp_path):
    for name in ("a", "b"):
        corpus.write_corpus(tmp_path / name, 1_000_000)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = corpus.read_corpus([str(tmp_path / "a")])
    assert found.distinct_bytes == found.num_bytes >= 1_000_000


def test_memory_and_processor_time_of_the_whole_tree_are_measured():
    """A child of the measured program holds 200 MB and computes."""
    child = "import time; held = bytearray(b'1') * 200_000_000\nend = time.process_time() + 0.6\n"
    child += "while time.process_time() < end: pass"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    measured = measure([sys.executable, "-c", program], {})
    assert 200e6 < measured.peak_rss < 400e6 and measured.cpu_seconds > 0.6
    assert measured.seconds > 0.6
    if sys.platform == "linux":
        assert 200e6 < measured.peak_pss <= measured.peak_rss


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark")
def test_a_peak_between_two_samples_of_memory_is_not_missed():
    program = "import time; held = b'1' * 300_000_000; del held; time.sleep(0.5)"
    assert 300e6 < measure([sys.executable, "-S", "-c", program], {}).peak_rss < 400e6


def test_a_program_that_fails_is_quoted():
    with pytest.raises(ConfigError, match="ended with exit code 3: second$"):
        measure([sys.executable, "-c", "import sys; sys.stderr.write('first\\nsecond\\n\\n'); sys.exit(3)"], {})


def test_spreads_and_tables():
    assert Spread.of([3.0, 1.0, 2.0]).text(1) == "2.0 (1.0-3.0)"
    assert Spread.of([1200.0, 1000.0]).text(0) == "1,100 (1,000-1,200)"
    assert table([["a", "b"], ["long", "1,000"]]) == ["a         b", "long  1,000"]


def test_the_programs_help_lists_its_commands():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "tools" / "benchmark.py"), "--help"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "data" in done.stdout


def run_in_a_process(command: str, teacher: str, folder: Path, *more: str) -> tuple[str, dict]:
    """A benchmark that starts a process group; its output and its figures."""
    flags = ["--teacher", teacher, "--student-hidden-size", "24", "--seq-length", "16", "--repeats", "2"]
    program = [sys.executable, str(Path(__file__).parents[2] / "tools" / "benchmark.py"), command]
    file = folder / "figures.json"
    done = subprocess.run([*program, *flags, "--json", str(file), *more], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


def test_the_cost_of_saving_is_measured_for_both_ways(tiny_llama, tmp_path):
    out, figures = run_in_a_process("checkpoint", tiny_llama(), tmp_path, "--folder", str(tmp_path))
    assert figures["bytes"] > 0 and len(figures["rounds"]) == 2
    blocked = sorted(each["blocked"] for each in figures["rounds"])
    (row,) = re.findall(r"^in the background, waiting .*$", out, re.M)
    assert f"({blocked[0]:.3f}-{blocked[-1]:.3f})" in row
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]  # nothing is left behind


def test_compose_and_pull_back_are_held_against_their_products_and_a_micro_batch(tiny_llama, tmp_path):
    out, figures = run_in_a_process("compose", tiny_llama(), tmp_path, "--bf16")
    shares = []
    for each in figures["rounds"]:
        both = each["compose"] + each["pull_back"]
        shares.append(both / (both + 8 * each["microbatch"]))
    (row,) = re.findall(r"^8 .*$", out, re.M)
    assert f"({min(shares):.3f}-{max(shares):.3f})" in row


HEAD = ["head", "--vocab-size", "4000", "--student-hidden-size", "24", "--teacher-hidden-size", "48", "--repeats", "2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_forms_of_the_head_agree_and_chunks_take_less_memory(tmp_path, capsys, dtype):
    flags = ["--tokens", "2048", "--loss-chunk-tokens", "64", "--dtype", dtype, "--json", str(tmp_path / "h.json")]
    assert benchmark([*HEAD, *flags]) == 0
    figures = json.loads((tmp_path / "h.json").read_text())
    full, chunked = (sorted(each["extra_bytes"])[0] for each in figures["contestants"].values())
    assert full > 2048 * 4000 * 4 > chunked  # one matrix of logits
    assert f"largest relative difference of loss and gradients {figures['difference']:.1e}" in capsys.readouterr().out


def test_forms_of_the_head_that_do_not_agree_are_an_error(monkeypatch, capsys):
    monkeypatch.setattr(head, "ours", lambda inputs, chunk_tokens: 1.01 * head.materialised(inputs, chunk_tokens))
    assert benchmark([*HEAD, "--tokens", "64", "--dtype", "float32"]) == 1
    assert "largest relative difference of loss and gradients 1.0e-02" in capsys.readouterr().out


def test_a_head_whose_full_logits_do_not_fit_is_refused(capsys):
    assert benchmark([*HEAD, "--tokens", str(10**9)]) == 2
    assert "Use fewer --tokens" in capsys.readouterr().err


def test_a_simulated_start_tells_every_rank(capsys):
    assert benchmark(["start", "--ranks", "9", "--repeats", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^9 ranks  +seconds.*\nall alike .*\none rank differs .*\nevery rank differs ", said), said


@pytest.mark.slow
def test_the_time_of_a_comparison_grows_with_the_ranks_and_not_with_their_square():
    """The best of some rounds, since other tests run beside it; all ranks share one interpreter here. Eight times the
    ranks take about eight times as long, and the square would be 64."""
    seconds = {}
    for ranks in (128, 1024):
        with start.Simulation(ranks) as simulation:
            for name in ("all alike", "one rank differs"):
                seconds[name, ranks] = min(simulation.compare(start.CASES[name])[0] for _ in range(5))
    for name in ("all alike", "one rank differs"):
        assert seconds[name, 1024] < 20 * seconds[name, 128], seconds


def test_models_that_generate_are_compared_with_the_first(tmp_path, capsys):
    """A KV cache holds two tensors of 2 groups x 16 features x 4 bytes in each of two layers."""
    write_llama(tmp_path / "one")
    write_llama(tmp_path / "other", num_layers=4)
    models = [str(tmp_path / name) for name in ("one", "other")]
    sizes = ["--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "2", "--device", "cpu"]
    assert benchmark(["generation", *models, *sizes]) == 0
    first, second = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert first[0] == models[0] and second[0] == models[1]
    assert (first[2], second[2]) == (str(2 * 2 * 2 * 16 * 4), "1,024") and first[5:] == ["1.00", "(1.00-1.00)"]
    assert 0 < float(second[5]) < 2
    assert benchmark(["generation", *models, "--new-tokens", "0"]) == 2
    assert capsys.readouterr().err == "benchmark.py: --new-tokens 0: expected is a number from 1.\n"
