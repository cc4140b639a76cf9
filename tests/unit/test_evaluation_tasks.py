"""--tasks of tools/evaluate.py: lm-evaluation-harness's own tasks on local files of a few rows."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hf_teachers import write_llama
from megatron_lrc.evaluation.harness import _known_tasks
from megatron_lrc.evaluation.local_tasks import write_local_tasks
from megatron_lrc.evaluation.nine_tasks import NINE_TASKS, PUBLISHED_AVERAGES, average_of, published_averages
from tools_path import tool_main

evaluate: Callable[[list[str]], int] = tool_main("evaluate")

LETTERS = ["A", "B", "C", "D", "E"]
ARC = [
    {
        "id": str(number),
        "question": f"Which language is {word}?",
        "choices": {"text": [f"a {word} model", "cloned", f"the {word}", "from small"], "label": LETTERS[:4]},
        "answerKey": LETTERS[number % 4],
    }
    for number, word in enumerate(["small", "large", "cloned", "a", "model", "from"])
]
#: Task -> split -> rows, with the columns of the datasets that the harness's tasks name.
ROWS: dict[str, dict[str, list[dict]]] = {
    "arc_easy": {"test": ARC},
    "arc_challenge": {"test": ARC, "train": ARC[:2]},
    "logiqa": {
        "test": [{"context": "All models.", "question": "Which?", "options": ["a", "b", "c", "d"], "label": "b"}]
    },
    "commonsense_qa": {
        "validation": [{"question": "Where?", "choices": {"text": list("abcde"), "label": LETTERS}, "answerKey": "C"}]
    },
    "piqa": {"validation": [{"goal": "Clone a model", "sol1": "Project it.", "sol2": "Ask it.", "label": 0}]},
    "winogrande": {
        "validation": [{"sentence": "The model is _ today.", "option1": "small", "option2": "large", "answer": "2"}]
    },
    "boolq": {"validation": [{"passage": "It is small.", "question": "is it small", "idx": 0, "label": 1}]},
    "sciq": {
        "test": [
            {"question": "Which?", "support": " It is.", "correct_answer": "it"}
            | {f"distractor{number}": f"no {number}" for number in (1, 2, 3)}
        ]
    },
    "mmlu/anatomy": {"test": [{"question": "Which?", "choices": list("wxyz"), "answer": n % 4} for n in range(3)]},
    "mmlu/virology": {"test": [{"question": "Who?", "choices": list("wxyz"), "answer": 1}]},
}


def write_rows(folder: Path) -> Path:
    for task, splits in ROWS.items():
        (folder / task).mkdir(parents=True)
        for split, rows in splits.items():
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *flags: Path | str) -> str:
    assert evaluate([str(flag) for flag in flags]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt: str, continuation: str) -> float:
    context = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + continuation)["input_ids"]
    log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(log_p[place - 1, whole[place]].item() for place in range(len(context), len(whole)))


def arc_scores(model, tokenizer) -> tuple[float, float, float]:
    """Plain accuracy of the rows, that of likelihoods per character, and bits per byte of the right answers."""
    plain, normalised, bits = [], [], []
    for row in ARC:
        texts = row["choices"]["text"]
        found = [
            log_likelihood(model, tokenizer, f"Question: {row['question']}\nAnswer:", f" {text}") for text in texts
        ]
        right = row["choices"]["label"].index(row["answerKey"])
        plain.append(max(range(4), key=lambda choice: found[choice]) == right)
        normalised.append(max(range(4), key=lambda choice: found[choice] / len(texts[choice])) == right)
        bits.append(-found[right] / math.log(2) / len(f" {texts[right]}"))
    return sum(plain) / len(plain), sum(normalised) / len(normalised), sum(bits) / len(bits)


def test_the_nine_tasks_run_on_local_files_with_the_harness_own_prompts_and_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain likelihoods for ARC-E, those per character for ARC-C; MMLU weighs subjects by their rows; and no average is
    given, since most of MMLU's subjects are missing."""
    pytest.importorskip("lm_eval")
    model, output = write_llama(tmp_path / "model"), tmp_path / "figures.json"
    tasks = write_rows(tmp_path / "tasks")
    flags = [str(tmp_path / "model"), "--tasks", "all", "--tasks-dir", str(tasks), "--output", str(output)]
    assert evaluate(flags) == 0
    found = json.loads(output.read_text())["tasks"]
    plain, normalised, bits = arc_scores(model, AutoTokenizer.from_pretrained(tmp_path / "model"))
    assert plain != normalised, "the rows do not tell the two metrics apart"
    assert found["scores"]["arc_easy"] == pytest.approx(plain)
    assert found["scores"]["arc_challenge"] == pytest.approx(normalised)
    assert found["bits_per_byte"]["arc_easy"] == pytest.approx(bits)
    assert found["stderr"]["arc_easy"] == pytest.approx(math.sqrt(plain * (1 - plain) / (len(ARC) - 1)))
    assert found["rows"]["mmlu"] == 4 and all(value > 0 for value in found["bits_per_byte"].values())
    subjects = [found["harness"][f"mmlu_{subject}"]["acc,none"] for subject in ("anatomy", "virology")]
    assert found["scores"]["mmlu"] == pytest.approx((3 * subjects[0] + subjects[1]) / 4)
    assert set(found["scores"]) == set(NINE_TASKS) and found["average"] is None
    printed = capsys.readouterr().out
    assert "mmlu: 2 of its 57 subjects" in printed
    for name, average in PUBLISHED_AVERAGES.items():
        assert any(line.startswith(name) and f"{average:.2f}" in line for line in printed.splitlines())


def test_files_that_a_task_needs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    write_llama(tmp_path / "model")
    tasks = write_rows(tmp_path / "tasks")
    (tasks / "sciq" / "test.jsonl").unlink()
    assert "sciq has no test.jsonl" in refused(capsys, tmp_path / "model", "--tasks", "sciq", "--tasks-dir", tasks)
    (tasks / "piqa" / "validation.jsonl").write_text('{"goal": "x"}\n')
    said = refused(capsys, tmp_path / "model", "--tasks", "piqa", "--tasks-dir", tasks)
    assert "lm_eval cannot load its tasks" in said and "columns of the hub's datasets" in said


def test_without_the_harness_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.models.huggingface", raising=False)
    write_llama(tmp_path / "model")
    said = refused(capsys, tmp_path / "model", "--tasks", "all")
    assert "pip install 'lm_eval[hf]'" in said


def test_an_average_needs_all_nine() -> None:
    scores = dict.fromkeys(NINE_TASKS, 0.5) | {"mmlu": 0.95}
    assert average_of(scores) == pytest.approx(0.55)
    assert average_of({task: value for task, value in scores.items() if task != "sciq"}) is None


def test_published_averages_stand_beside_ours() -> None:
    lines = published_averages("student", 0.5)
    expected = [[name, f"{average:.2f}"] for name, average in PUBLISHED_AVERAGES.items()]
    assert [line.split() for line in lines[1:]] == [*expected, ["student", "50.00"]]
    assert published_averages("student", None)[-1].split() == ["student", "-"]


def test_a_row_is_never_among_its_own_examples(tmp_path: Path) -> None:
    """Where the scored rows are all there is: named as test split, as validation split, and with rows that the harness
    rewrites first (hellaswag)."""
    pytest.importorskip("lm_eval")
    rows = {
        "arc_easy": ("test", ARC, "question"),
        "piqa": ("validation", [{"goal": f"Goal {n}", "sol1": "a", "sol2": "b", "label": 0} for n in range(4)], "goal"),
        "hellaswag": ("validation", [hellaswag_row(n) for n in range(4)], "ctx_a"),
    }
    for task, (split, items, _) in rows.items():
        (tmp_path / "tasks" / task).mkdir(parents=True)
        (tmp_path / "tasks" / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    known, definitions = _known_tasks(tuple(rows)), tmp_path / "definitions"
    definitions.mkdir()
    write_local_tasks(known.task_index, {task: [task] for task in rows}, tmp_path / "tasks", definitions, num_fewshot=3)
    manager = type(known)(include_path=str(definitions), include_defaults=False)
    for name, task in manager.load(list(rows))["tasks"].items():
        task.set_config(key="num_fewshot", value=3)
        task.set_fewshot_seed(1)
        task.build_all_requests()
        _, items, key = rows[name]
        for request in task.instances:
            own, others = items[request.doc_id][key], [row[key] for row in items]
            assert request.args[0].count(own) == 1, (name, request.args[0])
            assert sum(other in request.args[0] for other in others) == 4


def hellaswag_row(number: int) -> dict:
    row = {"ind": number, "activity_label": "Cloning", "ctx_a": f"Model {number} is small.", "ctx_b": "it"}
    row |= {"endings": ["is cloned.", "runs.", "waits.", "ends."], "label": "0", "split": "val", "source_id": "x"}
    return row | {"ctx": f"{row['ctx_a']} it", "split_type": "indomain"}


def test_a_task_beyond_the_nine_is_scored_by_its_own_metric(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    write_llama(tmp_path / "model")
    place = tmp_path / "tasks" / "hellaswag"
    place.mkdir(parents=True)
    (place / "validation.jsonl").write_text("".join(json.dumps(hellaswag_row(n)) + "\n" for n in range(3)))
    output = tmp_path / "figures.json"
    flags = [str(tmp_path / "model"), "--tasks", "hellaswag", "--num-fewshot", "1", "--output", str(output)]
    assert evaluate([*flags, "--tasks-dir", str(tmp_path / "tasks")]) == 0
    found = json.loads(output.read_text())["tasks"]
    assert found["metrics"] == {"hellaswag": "acc_norm"} and found["rows"] == {"hellaswag": 3}


def test_an_unknown_task_is_refused_with_near_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    said = refused(capsys, tmp_path, "--tasks", "hellaswagg")
    assert "no task of this name" in said and "hellaswag" in said.partition("Near it are")[2]
