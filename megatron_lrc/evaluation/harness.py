"""Tasks by lm-evaluation-harness (the optional package lm_eval): its prompts, metrics and arithmetic.

Its task definitions name datasets on the Hugging Face hub. Without a hub, `--tasks-dir` has their rows as files
(`local_tasks.py`).
"""

import difflib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_lrc.config import ConfigError
from megatron_lrc.data.directory_tokenizer import open_tokenizer
from megatron_lrc.evaluation.local_tasks import write_local_tasks
from megatron_lrc.evaluation.nine_tasks import NINE_TASKS
from megatron_lrc.evaluation.shared_contexts import harness_model
from megatron_lrc.evaluation.task_names import find_names
from megatron_lrc.evaluation.task_scores import TaskScore, score_of

#: Where the harness defines the nine: to read all of its thousands of definitions takes half a minute.
_FOLDERS = ("arc", "commonsense_qa", "logiqa", "mmlu/default", "piqa", "sciq", "super_glue/boolq", "winogrande")


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """scores: by task, of its metric in `NINE_TASKS` or its own. parts: how many of a group's subtasks were scored, and
    how many there are. details: all that the harness says of each (sub)task."""

    scores: dict[str, TaskScore]
    parts: dict[str, tuple[int, int]]
    details: dict[str, dict[str, Any]]

    @property
    def is_whole(self) -> bool:
        return all(scored == known for scored, known in self.parts.values())


def check_tasks(tasks: list[str]) -> None:
    """ConfigError where lm_eval is missing, which nothing but --tasks needs, or where it has no such task."""
    _check_harness()
    _known_tasks(tuple(tasks))


def _check_harness() -> None:
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
    """Score a loaded model on tasks of the harness. directory: its tokenizer's. limit: rows of each (sub)task."""
    check_tasks(tasks)
    lm_eval, datasets = map(import_module, ("lm_eval", "datasets"))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # versions that know scripts of data sets ask otherwise
    tokenizer = open_tokenizer(directory)
    known = _known_tasks(tuple(tasks))
    members = {task: list(_leaves(known.task_index, task)) for task in tasks}
    with tempfile.TemporaryDirectory(prefix="megatron_lrc_") as folder:
        if tasks_dir is None:
            manager, scored = known, members
        else:
            scored = write_local_tasks(known.task_index, members, tasks_dir, Path(folder), num_fewshot)
            manager = import_module("lm_eval.tasks").TaskManager(include_path=folder, include_defaults=False)
        loaded = _load_tasks(manager, [leaf for leaves in scored.values() for leaf in leaves], tasks_dir)
        results = lm_eval.simple_evaluate(
            model=harness_model(model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(loaded.values()),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    metrics = {task: NINE_TASKS[task][1] if task in NINE_TASKS else None for task in tasks}
    return TaskScores(
        scores={
            task: score_of(results, {leaf: loaded[leaf] for leaf in leaves}, metrics[task])
            for task, leaves in scored.items()
        },
        parts={task: (len(scored[task]), len(leaves)) for task, leaves in members.items()},
        details={leaf: results["results"][leaf] for leaves in scored.values() for leaf in leaves},
    )


@cache
def _known_tasks(tasks: tuple[str, ...]) -> Any:
    """The harness's TaskManager with its own definitions of these tasks. ConfigError for a name that it has not."""
    module: Any = import_module("lm_eval.tasks")
    home = Path(module.__file__).parent
    folders = [home / name for name in _FOLDERS]
    if others := [task for task in tasks if task not in NINE_TASKS]:
        named = find_names(home)
        for task in others:
            if task not in named:
                near = difflib.get_close_matches(task, named, n=4, cutoff=0.5)
                raise ConfigError(
                    f"--tasks {task}: lm-evaluation-harness has no task of this name. "
                    + (f"Near it are {', '.join(near)}." if near else "lm-eval ls tasks lists those it has.")
                )
            folders.append(named[task])
    there = [str(folder) for folder in dict.fromkeys(folders) if folder.is_dir()]
    manager = module.TaskManager(include_path=there, include_defaults=False)
    is_complete = all(_is_complete(manager.task_index, task) for task in tasks)
    return manager if is_complete else module.TaskManager()


def _is_complete(index: Any, task: str) -> bool:
    """Whether an index of some folders has all of it: a group or tag may have members elsewhere."""
    return task in index and (task in NINE_TASKS or index[task].kind.name == "TASK")


def _leaves(index: Any, name: str) -> Iterator[str]:
    """The tasks that a name of the harness means: itself, or those of a group or tag, in a fixed order."""
    entry = index[name]
    if entry.kind.name == "GROUP":
        for child in entry.cfg["task"]:
            if not isinstance(child, str):
                raise ConfigError(f"--tasks {name} is a group that defines tasks itself. Name its tasks one by one.")
            yield from _leaves(index, child)
    elif entry.kind.name == "TAG":
        yield from sorted(entry.tags)
    else:
        yield name


def _load_tasks(manager: Any, names: list[str], tasks_dir: Path | None) -> dict[str, Any]:
    try:
        return dict(manager.load(names)["tasks"])
    except Exception as error:  # of the hub, of a file, of a row: whatever the harness lets through
        reason = " ".join(str(error).split())[:300]
        remedy = (
            "Where there is no hub, give the tasks' files with --tasks-dir."
            if tasks_dir is None
            else f"The files in {tasks_dir} must have the columns of the hub's datasets."
        )
        raise ConfigError(f"lm_eval cannot load its tasks ({type(error).__name__}: {reason}). {remedy}") from error
