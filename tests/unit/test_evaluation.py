"""tools/evaluate.py on held-out text: figures with known answers, from Hugging Face directories and from runs."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_data
from checkpoints import write_run
from hf_teachers import write_llama, write_qwen2, write_qwen3
from megatron_lrc.config import ConfigError
from megatron_lrc.evaluation.heldout import Corpus, read_indexed
from megatron_lrc.evaluation.language_modeling import figures_of, measure
from megatron_lrc.hf.families import describe_teacher
from students import random_student
from tools_path import convert_to_hf, tool_main

evaluate: Callable[[list[str]], int] = tool_main("evaluate")
TEXTS = ["a small language model", "is cloned from a large language model", "language"]


def run_tool(model: Path, *flags: Path | str) -> dict:
    """The figures that the tool writes."""
    output = model.parent / "figures.json"
    assert evaluate([str(model), "--output", str(output), *map(str, flags)]) == 0
    return json.loads(output.read_text())


def refused(capsys: pytest.CaptureFixture[str], *flags: Path | str) -> str:
    """The sentence that the tool refuses with."""
    assert evaluate([str(flag) for flag in flags]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("evaluate.py: ")
    return said


def write_texts(folder: Path) -> Path:
    return Path(tiny_data.write_jsonl(folder / "heldout.jsonl", TEXTS))


def ids_of(directory: Path) -> torch.Tensor:
    """[1, n]: the texts, each with </s> behind it."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]
    return torch.tensor([sum(ids, [])])


def random_batches(*, vocab_size: int = 301, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (2, 25), generator=generator) for _ in range(2)]


# ------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize("write", [write_llama, write_qwen2, write_qwen3])
def test_perplexity_is_that_of_transformers_own_loss(tmp_path: Path, write: Callable) -> None:
    model = write(tmp_path / "model")
    figures = run_tool(tmp_path / "model", "--input", write_texts(tmp_path))["heldout"]["figures"]
    [found] = figures.values()
    ids = ids_of(tmp_path / "model")
    loss = model(ids, labels=ids).loss.item()
    assert found["tokens"] == ids.shape[1] - 1
    assert found["lm_loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_windows_and_batches_change_nothing_but_the_context(tmp_path: Path) -> None:
    """The mean over windows of 8 tokens, weighted by their labels, whatever the batch size."""
    model = write_llama(tmp_path / "model")
    text = write_texts(tmp_path)
    ids, losses = ids_of(tmp_path / "model"), []
    for start in range(0, ids.shape[1] - 1, 8):
        window = ids[:, start : start + 9]
        losses += [model(window, labels=window).loss.item()] * (window.shape[1] - 1)
    for batch_size in (1, 2, 100):
        found = run_tool(tmp_path / "model", "--input", text, "--seq-length", "8", "--batch-size", str(batch_size))
        [figures] = found["heldout"]["figures"].values()
        assert figures["lm_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert figures["tokens"] == len(losses) == ids.shape[1] - 1


def test_the_arithmetic_may_be_narrower(tmp_path: Path) -> None:
    write_llama(tmp_path / "model")
    flags = ("--input", write_texts(tmp_path), "--teacher", tmp_path / "model")
    wide, narrow = (run_tool(tmp_path / "model", *flags, "--dtype", dtype) for dtype in ("float32", "bfloat16"))
    [exact], [rounded] = (found["heldout"]["figures"].values() for found in (wide, narrow))
    assert narrow["dtype"] == "bfloat16" and rounded["kl"] == 0.0
    assert rounded["lm_loss"] != exact["lm_loss"] and rounded["lm_loss"] == pytest.approx(exact["lm_loss"], rel=0.02)


def test_a_model_agrees_with_itself_wholly(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_llama(model)
    [found] = run_tool(model, "--input", write_texts(tmp_path), "--teacher", model)["heldout"]["figures"].values()
    assert found["kl"] == 0.0 and found["top1_agreement"] == 1.0
    assert found["teacher_lm_loss"] == found["lm_loss"]


def test_kl_and_agreement_are_those_of_the_definition(tmp_path: Path) -> None:
    student, teacher = write_qwen2(tmp_path / "student"), write_llama(tmp_path / "teacher")
    figures, _ = measure(student, random_batches(), teacher=teacher)
    p, q, labels = [], [], []
    with torch.no_grad():
        for tokens in random_batches():
            p.append(teacher.double()(tokens[:, :-1]).logits.log_softmax(-1).flatten(0, 1))
            q.append(student.double()(tokens[:, :-1]).logits.log_softmax(-1).flatten(0, 1))
            labels.append(tokens[:, 1:].flatten())
    log_p, log_q, label = torch.cat(p), torch.cat(q), torch.cat(labels)
    assert figures.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-5)
    assert figures.top1_agreement == (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert figures.teacher_lm_loss == pytest.approx(F.nll_loss(log_p, label).item(), rel=1e-5)
    assert figures.next_token_accuracy == (log_q.argmax(-1) == label).double().mean().item()


def test_sums_of_corpora_add_up(tmp_path: Path) -> None:
    model, batches = write_llama(tmp_path / "model"), random_batches()
    whole, _ = measure(model, batches, teacher=model)
    parts = [measure(model, [batch], teacher=model)[1] for batch in batches]
    assert figures_of(parts[0] + parts[1], with_teacher=True) == whole


def test_padded_vocabulary_does_not_count(tmp_path: Path) -> None:
    """A student whose vocabulary another tool has padded, with rows that would win every softmax."""
    write_llama(tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    head = model.get_output_embeddings().weight.detach()
    model.resize_token_embeddings(320)
    with torch.no_grad():
        model.get_output_embeddings().weight[301:] = 100 * head[:19]
    model.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(tmp_path / "teacher").save_pretrained(tmp_path / "padded")
    text = write_texts(tmp_path)
    [padded] = run_tool(tmp_path / "padded", "--input", text, "--teacher", tmp_path / "teacher")["heldout"][
        "figures"
    ].values()
    assert padded["kl"] == pytest.approx(0, abs=1e-6) and padded["top1_agreement"] == 1.0
    assert padded["lm_loss"] == pytest.approx(padded["teacher_lm_loss"], rel=1e-6)


def test_other_tokenizers_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "model")
    write_llama(tmp_path / "other", vocab_size=280)
    said = refused(capsys, tmp_path / "model", "--input", write_texts(tmp_path), "--teacher", tmp_path / "other")
    assert "vocabulary of 301" in said and "one of 280" in said


# ------------------------------------------------------------------------------------------------ which model


def test_a_run_and_its_export_have_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the run's teacher has moved: --teacher says where it is."""
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    write_llama(teacher)
    description = describe_teacher(teacher)
    projections, norms = random_student(description, 28, has_lm_head=True)
    write_run(run, description, projections, norms)
    assert convert_to_hf(["--load", str(run), "--output", str(tmp_path / "student")]) == 0
    text = write_texts(tmp_path)
    expected = run_tool(tmp_path / "student", "--input", text, "--teacher", teacher)["heldout"]["figures"]
    assert run_tool(run, "--input", text, "--teacher", teacher)["heldout"]["figures"] == expected
    assert run_tool(run / "iter_0000003", "--input", text, "--teacher", teacher)["heldout"]["figures"] == expected
    teacher.rename(tmp_path / "moved")
    capsys.readouterr()
    found = run_tool(run, "--input", text, "--teacher", tmp_path / "moved")
    assert found["heldout"]["figures"] == expected and found["hidden_size"] == 28
    assert "exporting step 3" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "teacher")
    description = describe_teacher(tmp_path / "teacher")
    write_run(tmp_path / "run", description, *random_student(description, 28, has_lm_head=True))
    newer = tmp_path / "run" / "iter_0000009"
    newer.mkdir()
    for file in (tmp_path / "run" / "iter_0000003").iterdir():
        (newer / file.name).write_bytes(file.read_bytes())
    next(newer.glob("*.distcp")).write_bytes(b"")
    run_tool(tmp_path / "run", "--input", write_texts(tmp_path))
    assert f"{newer} is damaged" in capsys.readouterr().out
    next((tmp_path / "run" / "iter_0000003").glob("*.distcp")).unlink()
    assert "no checkpoint is whole" in refused(capsys, tmp_path / "run", "--input", tmp_path / "heldout.jsonl")


def test_what_is_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, tmp_path, "--input", write_texts(tmp_path))
    assert f"{tmp_path} holds no model" in said


# ------------------------------------------------------------------------------------------------ which text


def test_each_token_but_the_first_is_a_label_once() -> None:
    corpus = Corpus("c", numpy.arange(100, 123))
    for seq_length in (1, 5, 11, 22, 50):
        labels = [place for window in corpus.windows(seq_length) for place in window[1:]]
        assert labels == list(range(1, 23))
        assert all(len(window) <= seq_length + 1 for window in corpus.windows(seq_length))


def test_some_windows_are_taken_evenly() -> None:
    corpus = Corpus("c", numpy.zeros(1001))
    assert [window.start for window in corpus.windows(10, max_tokens=45)] == [0, 250, 500, 750]
    assert len(corpus.windows(10, max_tokens=3)) == 1
    assert corpus.windows(10, max_tokens=5000) == corpus.windows(10)


def test_parts_of_a_dataset_are_those_of_training(tmp_path: Path) -> None:
    """The documents that a run's --split holds out, and those it leaves for a test."""
    documents = [[number] * 3 for number in range(10)]
    prefix = tiny_data.write_dataset(tmp_path / "data", documents)
    for part, numbers in (("valid", [7, 8]), ("test", [9]), ("all", range(10))):
        [corpus] = read_indexed([prefix], "70,20,10", part, tmp_path)
        assert corpus.tokens.tolist() == [token for number in numbers for token in documents[number]]
    with pytest.raises(ConfigError, match="test part of --split 80,20 .* has 0 tokens"):
        read_indexed([prefix], "80,20", "test", tmp_path)


def test_a_dataset_of_another_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "model")
    prefix = tiny_data.write_dataset(tmp_path / "data", [[5, 6, 7], [8, 9, 301]])
    said = refused(capsys, tmp_path / "model", "--data-path", prefix, "--eval-split", "all")
    assert "token id 301" in said and "0 to 300" in said
    preprocess = tool_main("preprocess_data")
    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", tiny_data.make_texts(30))
    other = tiny_data.write_tokenizer(tmp_path / "tokenizer")
    assert preprocess(["--input", source, "--tokenizer-model", other, "--output-prefix", str(tmp_path / "o")]) == 0
    assert "another one" in refused(
        capsys, tmp_path / "model", "--data-path", tmp_path / "o_text_document", "--split", "50,50,0"
    )


def test_several_datasets_are_told_apart_and_added_up(tmp_path: Path) -> None:
    write_llama(tmp_path / "model")
    prefixes = [
        tiny_data.write_dataset(tmp_path / name, [list(range(start, start + 40))])
        for name, start in (("first", 3), ("second", 90))
    ]
    found = run_tool(tmp_path / "model", "--data-path", *prefixes, "--eval-split", "all")["heldout"]["figures"]
    assert list(found) == [*prefixes, "all"] and found["all"]["tokens"] == 78
    assert found["all"]["lm_loss"] == pytest.approx(sum(found[prefix]["lm_loss"] for prefix in prefixes) / 2)


# ------------------------------------------------------------------------------------------------ users' errors


def test_a_line_without_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path / "model")
    (tmp_path / "bad.jsonl").write_text('{"text": "a model"}\n{"body": "none"}\n')
    assert "bad.jsonl:2: no key 'text'" in refused(capsys, tmp_path / "model", "--input", tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "Give --data-path, --input or --tasks"),
        (["--teacher", "there"], "Give --data-path"),
        (["--input", "x.jsonl", "--seq-length", "0"], "--seq-length 0"),
        (["--input", "x.jsonl", "--max-tokens", "-1"], "--max-tokens -1"),
        (["--input", "x.jsonl", "--device", "tpu"], "--device tpu"),
        (["--tasks", "sciq", "--tasks-dir", "absent"], "--tasks-dir absent"),
    ],
)
def test_errors_say_what_to_do(
    tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_llama(tmp_path / "model")
    assert words in refused(capsys, tmp_path / "model", *flags)
