"""The demo's own pieces: text collection, teacher directory, report, and the shell's bookkeeping of steps.

What the demo does as a whole is checked by `make demo`; here its parts run on a tiny tree of files and tiny models.
"""

import gzip
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hf_teachers import write_llama
from megatron_lrc.comparison import collect_text
from megatron_lrc.evaluation.questions import Question, accuracy, encode_questions, read_questions
from megatron_lrc.hf.gguf import saveable

DEMO = Path(__file__).resolve().parents[2] / "examples/demo"
FALSE = shutil.which("false") or "/bin/false"
STEP_OUTPUTS = [
    "teacher/config.json",
    "text/heldout.jsonl",
    "data/train_text_document.idx",
    "data/heldout_text_document.idx",
    "arc_easy.jsonl",
    "untrained_run/finished",
    "untrained_student/config.json",
    "run/finished",
    "student/config.json",
    "report.txt",
]


def load(name: str) -> ModuleType:
    """A demo script as a module: examples/ is no package."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


report = load("report")
make_questions = load("make_questions")


def prose(topic: str) -> str:
    """A paragraph of its own for each topic: no run of eight words is shared with that of another."""
    words = [f"{topic}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    return f"The {topic} " + " ".join(words) + " and this is how the sentence ends."


# ---- text ----


def test_docstrings_are_read_in_order_without_importing(tmp_path: Path) -> None:
    (tmp_path / "pkg/tests").mkdir(parents=True)
    (tmp_path / "pkg/tests/test_x.py").write_text(f'"""{prose("suite")}"""')
    (tmp_path / "pkg/broken.py").write_text("def (:")
    (tmp_path / "pkg/mod.py").write_text(
        f'"""{prose("module")}\n\n>>> print("code")\n"""\nraise SystemExit\n'
        f'class A:\n  """{prose("class")}"""\n  if True:\n'
        f'    def f(x):\n      """{prose("function")}\n\n      Args:\n        x: {prose("args")}\n      """\n'
    )
    found = dict(collect_text.documents_from_files(tmp_path, "packages"))
    assert found == {
        "packages/pkg/broken.py": [],
        "packages/pkg/mod.py": [prose("module"), prose("class"), prose("function")],
    }


@pytest.mark.parametrize(
    "paragraph",
    [
        "Too short.",
        "x = f(y, z); " * 20,
        "| a | b |" * 30,
        "name : type, and then some words that go on. " * 4,
        "word " * 60,
    ],
)
def test_what_is_no_prose_is_dropped(paragraph: str) -> None:
    assert collect_text.prose_paragraphs(paragraph) == []


def test_pydoc_topics_give_text_everywhere() -> None:
    documents = dict(collect_text.documents_from_topics())
    assert sum(len(paragraph) for paragraphs in documents.values() for paragraph in paragraphs) > 100_000


def fake_documents(num_sources: int) -> list[tuple[str, list[str]]]:
    """Each source has four paragraphs of its own, one that all share, and one that differs in a word."""
    shared, copied = prose("shared"), prose("copied").split()
    return [
        (f"s{i}", [prose(f"s{i}p{j}") for j in range(4)] + [shared, " ".join([f"Version{i}", *copied])])
        for i in range(num_sources)
    ]


def test_no_text_is_in_both_parts() -> None:
    train, heldout = collect_text.split_documents(fake_documents(100), 0.2)
    assert len(train) > 60 and len(heldout) > 8
    assert not {source for source, _ in train} & {source for source, _ in heldout}
    train_paragraphs = [paragraph for _, paragraphs in train for paragraph in paragraphs]
    heldout_paragraphs = [paragraph for _, paragraphs in heldout for paragraph in paragraphs]
    assert len(set(train_paragraphs + heldout_paragraphs)) == len(train_paragraphs + heldout_paragraphs)
    assert any("copieda" in paragraph for paragraph in train_paragraphs)
    assert not any("copieda" in paragraph for paragraph in heldout_paragraphs), (
        "near copies must leave the held-out part"
    )


def test_a_source_keeps_its_part_when_others_come() -> None:
    few = collect_text.split_sources([f"s{i}" for i in range(50)], 0.2)
    many = collect_text.split_sources([f"s{i}" for i in range(100)], 0.2)
    assert set(few[0]) <= set(many[0]) and set(few[1]) <= set(many[1])
    assert 5 <= len(many[1]) <= 40


def test_collection_is_repeatable_and_order_blind(tmp_path: Path) -> None:
    documents = fake_documents(60)
    for folder, order in (("a", documents), ("b", documents[::-1])):
        collect_text.write_parts(
            order, tmp_path / folder, heldout_share=0.2, min_train_bytes=1000, min_heldout_bytes=1000
        )
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_too_little_text_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="held-out text; 1000000 are needed"):
        collect_text.write_parts(
            fake_documents(60), tmp_path / "text", heldout_share=0.2, min_train_bytes=1, min_heldout_bytes=1_000_000
        )
    assert not (tmp_path / "text").exists()


# ---- teacher ----


def test_teacher_is_saved_without_traces_of_gguf(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", is_tied=True)
    source.config.rms_norm_eps = 9.999999747378752e-06  # 1e-5 as GGUF's float32 gives it
    source.config.unk_token_id = 0
    for layer in source.modules():
        if hasattr(layer, "variance_epsilon"):
            layer.variance_epsilon = source.config.rms_norm_eps
    saveable(source).save_pretrained(tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher/config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32" and not {"quantization_config", "unk_token_id"} & config.keys()
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "teacher").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, source(ids).logits, rtol=0, atol=1e-6)
    assert saved.lm_head.weight is saved.model.embed_tokens.weight


# ---- report ----


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models (the untrained student is the teacher's twin), held-out text and the metrics of a resumed run."""
    root = tmp_path_factory.mktemp("demo")
    model = write_llama(root / "teacher")
    shutil.copytree(root / "teacher", root / "untrained")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    model.save_pretrained(root / "student")
    texts = [prose(f"t{i}") for i in range(6)]
    (root / "heldout.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    records = []
    for step in (1, 2, 3, 2, 3, 4):  # stopped in step 3, continued from step 1
        terms = {"loss": 8.0, "lm_loss": 6.0 - step, "kl_loss": 2.0, "clone_loss": 9.0 / step, "teacher_lm_loss": 1.5}
        pace = {"grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 64.0, "step_seconds": 1.0}
        records.append({"step": step, "tokens": 64 * step, **terms, **pace})
    valid = [{"step": step, "tokens": 64 * step, "lm_loss": 6.0, "kl_loss": 2.0, "clone_loss": 9.0} for step in (0, 4)]
    items = [{"prompt": text[:40], "choices": [" reads", " the", " teacher"], "answer": 0} for text in texts]
    (root / "questions.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (root / "run").mkdir()
    for name, lines in (("metrics", records), ("validation", valid)):
        (root / "run" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    return root


def run_report(root: Path, **replaced: Path) -> subprocess.CompletedProcess[str]:
    paths = {name: root / name for name in ("teacher", "untrained", "student")}
    paths |= {
        "heldout": root / "heldout.jsonl",
        "questions": root / "questions.jsonl",
        "run": root / "run",
        "output-dir": root / "out",
    } | replaced
    flags = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    command = [
        sys.executable,
        str(DEMO / "report.py"),
        *flags,
        "--block",
        "32",
        "--max-tokens",
        "128",
        "--new-tokens",
        "5",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow  # make demo runs the same
def test_report_compares_the_models_on_the_same_tokens(measured: Path) -> None:
    finished = run_report(measured)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads((measured / "out/report.json").read_text())
    teacher, untrained, student = (
        figures["models"][name] for name in ("teacher", "untrained student", "trained student")
    )
    assert teacher["lm_loss"] == untrained["lm_loss"] != student["lm_loss"]
    assert teacher["continuation"] == untrained["continuation"]
    assert student["perplexity"] == pytest.approx(math.exp(student["lm_loss"]))
    assert figures["heldout"]["tokens"] == 128
    assert teacher["accuracy"] == untrained["accuracy"] and figures["questions"]["number"] == 6
    printed = (measured / "out/report.txt").read_text()
    assert printed in finished.stdout
    assert f"{student['lm_loss']:.4f}" in printed and "256 tokens in 4 steps, 64 tokens/s" in printed
    gap = student["lm_loss"] - teacher["lm_loss"]
    drawn = (measured / "out/loss_curves.svg").read_text()
    assert drawn.count(">tokens trained on</text>") == 3 and f"{gap:.4g}</tspan>" in drawn


def test_heldout_loss_equals_that_of_transformers(measured: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(measured / "teacher")
    model = AutoModelForCausalLM.from_pretrained(measured / "teacher")
    blocks = report.heldout_blocks(measured / "heldout.jsonl", tokenizer, block=32, max_tokens=10**6)
    assert blocks.shape[1] == 33 and torch.equal(blocks[0, -1], blocks[1, 0]), (
        "rows share a token: none goes unpredicted"
    )
    with torch.no_grad():
        expected = model(blocks, labels=blocks).loss.item()
    assert report.lm_loss(model, blocks) == pytest.approx(expected, rel=1e-5)


def test_questions_are_answered_as_the_evaluation_does(measured: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(measured / "teacher")
    model = AutoModelForCausalLM.from_pretrained(measured / "teacher").eval()
    texts = [json.loads(line)["text"] for line in (measured / "heldout.jsonl").read_text().splitlines()]
    choices = (" reads it", " the", " teacher of it all", " a")
    found = []
    for text in texts:
        chosen = report.choose(model, tokenizer, Question(text[:40], choices, 0))
        found.append(chosen)
        questions = [Question(text[:40], choices, answer) for answer in range(4)]
        encoded = [encode_questions([question], tokenizer) for question in questions]
        right = [
            accuracy(model, [question], rows, batch_size=2, vocab_size=model.config.vocab_size)
            for question, rows in zip(questions, encoded, strict=True)
        ]
        assert right.index(1.0) == chosen and sum(right) == 1.0
    questions = [Question(text[:40], choices, 0) for text in texts]
    assert report.share_right(model, tokenizer, questions) == found.count(0) / len(found)
    assert report.share_right(model, tokenizer, []) is None


def test_the_gap_is_of_the_same_tokens(measured: Path) -> None:
    training, validation = report.read_run(measured / "run")
    assert report.points(training, "gap") == [(64 * step, 4.5 - step) for step in (1, 2, 3, 4)]
    assert report.points(validation, "gap") == [], "without the teacher's loss there is none"
    assert report.points(validation, "kl_loss") == [(0, 2.0), (256, 2.0)]


def test_of_a_repeated_step_the_last_record_counts(measured: Path) -> None:
    training, validation = report.read_run(measured / "run")
    assert [record["step"] for record in training] == [1, 2, 3, 4]
    assert [record["step"] for record in validation] == [0, 4]


def test_report_without_training_steps_is_one_sentence(measured: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    finished = run_report(measured, run=tmp_path)
    assert finished.returncode == 2 and "has no training step" in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1


# ---- questions ----


def write_package(folder: Path, questions: int) -> None:
    """An archive as the package index gives it: a request per answer, and one of the answer without its question."""
    requests = []
    for number in range(questions):
        doc = {"query": f"Question: q{number}?\nAnswer:", "choices": ["a", "b", "c"], "gold": number % 3}
        for context in (doc["query"], "Answer:"):
            native = f"id{number}"
            requests += [
                {"doc": doc, "request": {"context": context, "continuation": f" {choice}"}, "native_id": native}
                for choice in doc["choices"]
            ]
    folder.mkdir()
    with zipfile.ZipFile(folder / "tasks-1-py3-none-any.whl", "w") as archive:
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        archive.writestr(make_questions.MEMBER, gzip.compress(lines.encode()))


def test_questions_come_from_all_parts_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path / "package", 12)
    output = tmp_path / "items.jsonl"
    flags = ["--package", str(tmp_path / "package"), "--rows", "4", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["make_questions.py", *flags])
    make_questions.main()
    found = read_questions(output)
    assert [question.prompt for question in found] == [f"Question: q{n}?\nAnswer:" for n in (0, 3, 6, 9)]
    assert found[1].choices == (" a", " b", " c") and [question.answer for question in found] == [0, 0, 0, 0]
    assert len(make_questions.evenly(list(range(7)), 100)) == 7
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["make_questions.py", *flags[2:], "--package", str(tmp_path / "empty")])
    with pytest.raises(SystemExit):
        make_questions.main()


# ---- run.sh ----


def start_demo(directory: Path, python: str, **settings: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "DEMO_DIR": str(directory), "PYTHON": python, **settings}
    return subprocess.Popen(
        ["bash", str(DEMO / "run.sh")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A test run started in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish_demo(demo: subprocess.Popen[str]) -> str:
    """Everything it printed; its processes are gone afterwards, also where it hangs."""
    try:
        return demo.communicate(timeout=30)[0]
    except subprocess.TimeoutExpired:
        os.killpg(demo.pid, signal.SIGKILL)
        raise


def write_outputs(directory: Path, names: list[str]) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"content of {name}\n")


def test_second_run_does_nothing_but_print_the_report(tmp_path: Path) -> None:
    write_outputs(tmp_path, STEP_OUTPUTS)
    demo = start_demo(tmp_path, FALSE)
    output = finish_demo(demo)
    assert demo.returncode == 0, output
    assert output.count("already in") == 10 and "content of report.txt" in output
    assert output.count("next: train it further") == 1 and "--preset recommended --teacher HF_DIR" in output


def test_failing_step_is_named_with_its_log_and_the_way_on(tmp_path: Path) -> None:
    write_outputs(tmp_path, STEP_OUTPUTS[:1])
    demo = start_demo(tmp_path, FALSE)
    output = finish_demo(demo)
    assert demo.returncode == 1
    assert "failed in step 2 of 10" in output and str(tmp_path / "logs/text.log") in output
    assert "run the same command again" in output and "[3/10]" not in output


def write_recorder(path: Path, then: str) -> str:
    """An interpreter that writes its arguments down and then does `then`: what run.sh asks for, without doing it."""
    path.write_text(f'#!/bin/sh\necho "$@" >> "{path}.calls"\n{then}\n')
    path.chmod(0o755)
    return str(path)


def test_ctrl_c_ends_the_step_and_says_how_to_go_on(tmp_path: Path) -> None:
    write_outputs(tmp_path, STEP_OUTPUTS[:1])
    demo = start_demo(tmp_path, write_recorder(tmp_path / "python", "exec sleep 60"))
    deadline = time.monotonic() + 20
    while not (tmp_path / "python.calls").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(demo.pid, signal.SIGINT)
    output = finish_demo(demo)
    assert demo.returncode == 130
    assert "Interrupted" in output and "step 2 of 10" in output and "run the same command again" in output


@pytest.mark.parametrize("suffix", ["", ".partial"])
def test_interrupted_training_continues_if_it_left_a_checkpoint(tmp_path: Path, suffix: str) -> None:
    has_checkpoint = not suffix
    write_outputs(tmp_path, STEP_OUTPUTS[:7])
    write_outputs(tmp_path, ["run/metrics.jsonl", f"run/iter_0000020{suffix}/run.json"])
    demo = start_demo(tmp_path, write_recorder(tmp_path / "python", "exit 3"))
    output = finish_demo(demo)
    assert demo.returncode == 3 and "failed in step 8 of 10" in output
    call = (tmp_path / "python.calls").read_text()
    assert f"--save {tmp_path}/run" in call
    assert (f"--load {tmp_path}/run" in call) == has_checkpoint
    assert (tmp_path / "run/metrics.jsonl").exists() == has_checkpoint, "without a checkpoint the run starts clean"


def test_more_steps_than_a_finished_demo_had_train_it_further(tmp_path: Path) -> None:
    write_outputs(tmp_path, [*STEP_OUTPUTS, "run/iter_0000024/run.json"])
    (tmp_path / "run/finished").write_text("24\n")
    demo = start_demo(tmp_path, write_recorder(tmp_path / "python", "exit 3"), TRAIN_ITERS="96")
    output = finish_demo(demo)
    assert demo.returncode == 3 and "trained further, to 96" in output and "failed in step 8 of 10" in output
    call = (tmp_path / "python.calls").read_text()
    assert call.rstrip().endswith(f"--load {tmp_path}/run") and "--train-iters 96" in call
    assert "--preset recommended" in call
    assert not (tmp_path / "student").exists(), "it would be that of 24 steps"
