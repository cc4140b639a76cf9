"""Scores of tasks from the harness's rows, and its definitions for local files; lm_eval is not needed."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_lrc.config import ConfigError
from megatron_lrc.evaluation.evaluate import task_table
from megatron_lrc.evaluation.local_tasks import _local_settings
from megatron_lrc.evaluation.task_names import find_names
from megatron_lrc.evaluation.task_scores import TaskScore, score_of, standard_error


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@dataclass
class Task:
    """What scores need of the harness's ConfigurableTask; a row is {"gold": ..., "choices": [...]}."""

    OUTPUT_TYPE: str = "multiple_choice"
    multiple_input: bool = False
    metrics: dict[str, Any] = field(default_factory=lambda: {"acc": mean, "acc_norm": mean})

    def aggregation(self) -> dict[str, Any]:
        return self.metrics

    def doc_to_target(self, row: dict) -> Any:
        return row["gold"]

    doc_to_text = doc_to_target

    def doc_to_choice(self, row: dict) -> list[str]:
        return row["choices"]


def sample(likelihoods: list[float], gold: Any, **metrics: float) -> dict:
    """A row with answers " a", " bb", " \u00e9": 2, 3 and 3 bytes."""
    choices = ["a", "bb", "\u00e9"][: len(likelihoods)]
    return {
        "filter": "none",
        "doc": {"gold": gold, "choices": choices},
        "arguments": [("context", f" {choice}") for choice in choices],
        "filtered_resps": [(value, False) for value in likelihoods],
        **metrics,
    }


def results_of(samples: dict[str, list[dict]], *metrics: str) -> dict[str, Any]:
    figures = {
        leaf: {f"{name},none": mean([row[name] for row in rows]) for name in metrics} for leaf, rows in samples.items()
    }
    return {"samples": samples, "results": {leaf: {"alias": leaf, **found} for leaf, found in figures.items()}}


def test_bits_per_byte_are_of_the_right_answer_and_errors_are_of_the_mean() -> None:
    """By place, by name, and by a place among several right ones."""
    bit = -math.log(2)
    rows = [sample([4 * bit, 9 * bit], 0, acc=1.0), sample([bit, 9 * bit], "bb", acc=0.0)]
    rows.append(sample([9 * bit, 9 * bit, 3 * bit], [0, 2], acc=1.0))
    found = score_of(results_of({"task": rows}, "acc"), {"task": Task()}, None)
    assert found.bits_per_byte == pytest.approx((2 + 3 + 1) / 3)
    assert found.bits_per_byte_stderr == pytest.approx(1 / math.sqrt(3))
    assert (found.metric, found.rows, found.score) == ("acc", 3, pytest.approx(2 / 3))
    assert found.stderr == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))


def test_a_group_is_scored_over_all_its_rows_together() -> None:
    samples = {
        "large": [sample([-1.0], 0, acc=value) for value in (1.0, 1.0, 0.0)],
        "small": [sample([-7.0], 0, acc=0.0)],
    }
    found = score_of(results_of(samples, "acc"), {"large": Task(), "small": Task()}, "acc")
    assert found.score == 0.5 and found.rows == 4
    assert found.stderr == pytest.approx(standard_error([1, 1, 0, 0]))
    assert found.bits_per_byte == pytest.approx((3 * 1 + 7) / 4 / math.log(2) / 2)


def test_the_metric_is_the_tasks_own() -> None:
    rows = {"task": [sample([-1.0], 0, f1=0.5, acc=1.0, acc_norm=0.0)]}
    chosen = [
        score_of(results_of(rows, *metrics), {"task": Task()}, None).metric
        for metrics in (("f1", "acc", "acc_norm"), ("f1", "acc"), ("f1",))
    ]
    assert chosen == ["acc_norm", "acc", "f1"]
    with pytest.raises(ConfigError, match="no metric in common"):
        score_of(
            {"results": {"a": {"f1,none": 1.0}, "b": {"acc,none": 1.0}}, "samples": {}},
            {"a": Task(), "b": Task()},
            None,
        )


def test_what_is_no_mean_over_rows_has_no_standard_error() -> None:
    rows = {"task": [sample([-1.0], 0, perplexity=3.0), sample([-1.0], 0, perplexity=4.0)]}
    task = Task(OUTPUT_TYPE="loglikelihood", metrics={"perplexity": max})
    found = score_of(results_of(rows, "perplexity"), {"task": task}, None)
    assert found.stderr is None and found.bits_per_byte == pytest.approx(1 / math.log(2) / 2)
    assert score_of(results_of(rows, "perplexity"), {"task": Task("generate_until")}, None).bits_per_byte is None


def test_the_table_has_errors_beside_scores() -> None:
    lines = task_table(
        {
            "sciq": TaskScore(
                metric="acc", score=0.75, stderr=0.01, rows=1000, bits_per_byte=1.2, bits_per_byte_stderr=0.03
            ),
            "other": TaskScore(
                metric="perplexity", score=31.5, stderr=None, rows=9, bits_per_byte=None, bits_per_byte_stderr=None
            ),
        }
    )
    assert lines[1].split() == ["SciQ", "acc", "1,000", "75.00", "+-", "1.00", "%", "1.200", "+-", "0.030"]
    assert lines[2].split() == ["other", "perplexity", "9", "31.5000", "-"]


# ------------------------------------------------------------------------------------------------ definitions


def test_names_are_found_in_the_text_of_definitions(tmp_path: Path) -> None:
    files = {
        "a/one.yaml": "tag:\n  - easy\ntask: one\ndataset_path: x\n",
        "b/_group.yaml": "group: both\ntask:\n  - one\n  - 'two.b'\n",
        "b/two.yaml": 'include: base\ntask: "two.b"\ntag: hard\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {name: folder.name for name, folder in find_names(tmp_path).items()}
    assert found == {"one": "a", "two.b": "b", "both": "b", "easy": "a", "hard": "b"}


# ------------------------------------------------------------------------------------------------ local files


@pytest.mark.parametrize(
    ("definition", "files", "examples"),
    [
        ({"test_split": "test", "training_split": "train"}, ("test", "train"), "train"),
        ({"test_split": "test", "training_split": "train", "validation_split": "validation"}, ("test",), "test"),
        ({"validation_split": "validation", "training_split": "train"}, ("validation",), "validation"),
        ({"test_split": "test", "fewshot_split": "dev"}, ("test", "dev"), "dev"),
    ],
)
def test_examples_come_from_rows_that_are_there(
    tmp_path: Path, definition: dict, files: tuple[str, ...], examples: str
) -> None:
    """The split that is scored is named as test_split, since only then a row is kept out of its own examples."""
    for split in files:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": split}))
    settings = _local_settings({"task": "t", **definition}, tmp_path, num_fewshot=5)
    scored = definition.get("test_split") or definition["validation_split"]
    assert settings["fewshot_split"] == examples and settings["test_split"] == scored
    assert settings.get("training_split") == ("train" if "train" in files else None)
    assert "fewshot_split" not in _local_settings({"task": "t", "test_split": files[0]}, tmp_path, num_fewshot=0)


def test_a_definition_without_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no split"):
        _local_settings({"task": "t"}, tmp_path, num_fewshot=0)
