"""The paper's nine tasks by lm-evaluation-harness (the optional package lm_eval): its prompts, metrics and arithmetic.

Its task definitions name datasets on the Hugging Face hub. Without a hub, `--tasks-dir` has their rows as files:

    TASKS_DIR/arc_easy/test.jsonl            rows with the columns of the hub's dataset; SPLIT.jsonl, SPLIT.json,
    TASKS_DIR/piqa/validation.jsonl          SPLIT.parquet, or the hub's own SPLIT-00000-of-00001.parquet
    TASKS_DIR/mmlu/anatomy/test.jsonl        one folder for each subject

For each task a YAML file is then written that includes the harness's own definition and changes only where rows come
from. Splits without a file are left out; the one that is scored must be there.
"""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from megatron_lrc.config import ConfigError
from megatron_lrc.data.directory_tokenizer import open_tokenizer
from megatron_lrc.evaluation.nine_tasks import NINE_TASKS

#: Names of the harness's settings that hold the name of a split.
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
#: Where the harness defines the nine: to read all of its thousands of definitions takes half a minute.
_FOLDERS = ("arc", "commonsense_qa", "logiqa", "mmlu/default", "piqa", "sciq", "super_glue/boolq", "winogrande")
_FORMATS = {"json": ("{}.jsonl", "{}.json"), "parquet": ("{}.parquet", "{}-*.parquet")}


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """scores: fraction by task, of its metric in `NINE_TASKS`. parts: how many of a group's subtasks were scored, and
    how many there are. details: all that the harness says of each (sub)task."""

    scores: dict[str, float]
    parts: dict[str, tuple[int, int]]
    details: dict[str, dict[str, Any]]

    @property
    def is_whole(self) -> bool:
        return all(scored == known for scored, known in self.parts.values())


def check_harness() -> None:
    """--tasks needs lm_eval, which nothing else here does."""
    try:
        import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs lm-evaluation-harness, which cannot be imported ({error}). Run pip install 'lm_eval[hf]', "
            "or leave out --tasks."
        ) from error


def run_tasks(
    model: Any,
    directory: Path,
    tasks: list[str],
    *,
    tasks_dir: Path | None = None,
    batch_size: int = 8,
    num_fewshot: int = 0,
    limit: int | None = None,
) -> TaskScores:
    """Score a loaded model on tasks out of `NINE_TASKS`. directory: its tokenizer's. limit: rows of each (sub)task."""
    check_harness()
    lm_eval, wrapper, datasets = map(import_module, ("lm_eval", "lm_eval.models.huggingface", "datasets"))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    tokenizer = open_tokenizer(directory)
    known = _known_tasks(tasks)
    members = {task: list(_leaves(known.task_index, task)) for task in tasks}
    with tempfile.TemporaryDirectory(prefix="megatron_lrc_") as folder:
        if tasks_dir is None:
            manager, scored = known, members
        else:
            scored = _write_local_tasks(known.task_index, members, tasks_dir, Path(folder), num_fewshot)
            manager = import_module("lm_eval.tasks").TaskManager(include_path=folder, include_defaults=False)
        loaded = _load_tasks(manager, [leaf for leaves in scored.values() for leaf in leaves], tasks_dir)
        results = lm_eval.simple_evaluate(
            model=wrapper.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=loaded,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    return TaskScores(
        scores={task: _score(results, leaves, NINE_TASKS[task][1]) for task, leaves in scored.items()},
        parts={task: (len(scored[task]), len(leaves)) for task, leaves in members.items()},
        details={leaf: results["results"][leaf] for leaves in scored.values() for leaf in leaves},
    )


def _known_tasks(tasks: list[str]) -> Any:
    """The harness's TaskManager with its own definitions of these tasks."""
    module: Any = import_module("lm_eval.tasks")
    folders = [str(Path(module.__file__).parent / folder) for folder in _FOLDERS]
    manager = module.TaskManager(include_path=folders, include_defaults=False)
    return manager if all(task in manager.task_index for task in tasks) else module.TaskManager()


def _leaves(index: Any, name: str) -> Iterator[str]:
    """The tasks that a name of the harness means: itself, or those of a group or tag, in a fixed order."""
    entry = index[name]
    if entry.kind.name == "GROUP":
        for child in entry.cfg["task"]:
            yield from _leaves(index, child)
    elif entry.kind.name == "TAG":
        yield from sorted(entry.tags)
    else:
        yield name


def _load_tasks(manager: Any, names: list[str], tasks_dir: Path | None) -> list[Any]:
    try:
        return list(manager.load(names)["tasks"].values())
    except Exception as error:  # of the hub, of a file, of a row: whatever the harness lets through
        reason = " ".join(str(error).split())[:300]
        remedy = (
            "Where there is no hub, give the tasks' files with --tasks-dir."
            if tasks_dir is None
            else f"The files in {tasks_dir} must have the columns of the hub's datasets."
        )
        raise ConfigError(f"lm_eval cannot load its tasks ({type(error).__name__}: {reason}). {remedy}") from error


def _score(results: dict[str, Any], leaves: list[str], metric: str) -> float:
    """Of a group the mean over all rows of its subtasks, as the harness's own definition of MMLU weighs them."""
    counts = [results["n-samples"][leaf]["effective"] for leaf in leaves]
    values = [results["results"][leaf][f"{metric},none"] for leaf in leaves]
    return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)


# ------------------------------------------------------------------------------------------------ local files


def _write_local_tasks(
    index: Any, members: dict[str, list[str]], tasks_dir: Path, folder: Path, num_fewshot: int
) -> dict[str, list[str]]:
    """A YAML file in `folder` for each task with files in `tasks_dir`; gives those. Of a group some may be missing."""
    written: dict[str, list[str]] = {}
    for task, leaves in members.items():
        subjects = {leaf: "" if leaf == task else index[leaf].cfg["dataset_name"] for leaf in leaves}
        places = {leaf: tasks_dir / task / subject for leaf, subject in subjects.items()}
        written[task] = [leaf for leaf in leaves if leaf == task or places[leaf].is_dir()]
        if not written[task]:
            raise ConfigError(
                f"--tasks-dir {tasks_dir} has no folder of {task}: {places[leaves[0]]} and its like are expected."
            )
        for leaf in written[task]:
            settings = _local_settings(index[leaf].cfg, places[leaf], num_fewshot)
            settings["dataset_kwargs"]["cache_dir"] = str(folder / "cache")
            definition = {"include": str(index[leaf].yaml_path), "task": leaf, **settings}
            (folder / f"{leaf}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
    return written


def _local_settings(definition: dict[str, Any], place: Path, num_fewshot: int) -> dict[str, Any]:
    """What is changed in a task's definition so that its rows come from the files in `place`."""
    splits = {name: definition[name] for name in _SPLITS if definition.get(name)}
    by_format = {
        kind: {split: files for split in splits.values() if (files := _files_of(place, split, patterns))}
        for kind, patterns in _FORMATS.items()
    }
    kind = max(by_format, key=lambda name: len(by_format[name]))
    data_files = by_format[kind]
    needed = {splits.get("test_split") or splits["validation_split"]}
    if num_fewshot:
        needed.add(splits.get("fewshot_split") or splits.get("training_split") or splits["validation_split"])
    if missing := sorted(needed - set(data_files)):
        raise ConfigError(
            f"{place} has no {missing[0]}.jsonl (or .json, .parquet, -*.parquet; all of one kind), which "
            f"{definition['task']} needs."
        )
    absent = {name: None for name, split in splits.items() if split not in data_files}
    return {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": data_files}, **absent}


def _files_of(place: Path, split: str, patterns: tuple[str, ...]) -> list[str]:
    found = [sorted(place.glob(pattern.format(split))) for pattern in patterns]
    return [str(path.resolve()) for path in next((paths for paths in found if paths), [])]
