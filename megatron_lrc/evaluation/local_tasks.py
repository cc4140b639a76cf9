"""Definitions of tasks for lm-evaluation-harness whose rows are files, for where there is no Hugging Face hub.

    TASKS_DIR/arc_easy/test.jsonl            rows with the columns of the hub's dataset; SPLIT.jsonl, SPLIT.json,
    TASKS_DIR/piqa/validation.jsonl          SPLIT.parquet, or the hub's own SPLIT-00000-of-00001.parquet
    TASKS_DIR/mmlu/anatomy/test.jsonl        of a group, one folder for each of its data sets

For each task a YAML file is written that includes the harness's own definition and changes only where rows come from.
Splits without a file are left out; the one that is scored must be there.

Examples in prompts come from the split that the definition names, else from the training split, the validation split
or, where there is nothing else, the rows that are scored. The harness then leaves the scored row out, but only where
the definition names the same split both as `test_split` and as `fewshot_split` (its ConfigurableTask.fewshot_context;
without a name, or with a validation split that is scored, the row may be among its own examples). So both are named.
"""

from pathlib import Path
from typing import Any

import yaml

from megatron_lrc.config import ConfigError

#: Names of the harness's settings that hold the name of a split, in the order in which it looks for examples.
_SPLITS = ("fewshot_split", "training_split", "validation_split", "test_split")
_FORMATS = {"json": ("{}.jsonl", "{}.json"), "parquet": ("{}.parquet", "{}-*.parquet")}


def write_local_tasks(
    index: Any, members: dict[str, list[str]], tasks_dir: Path, folder: Path, num_fewshot: int
) -> dict[str, list[str]]:
    """A YAML file in `folder` for each task with files in `tasks_dir`; gives those. Of a group some may be missing."""
    written: dict[str, list[str]] = {}
    for task, leaves in members.items():
        subjects = {leaf: "" if leaf == task else index[leaf].cfg.get("dataset_name") or leaf for leaf in leaves}
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
    scored = splits.get("test_split") or splits.get("validation_split")
    if scored is None:
        raise ConfigError(f"{definition['task']} names no split of a data set, so --tasks-dir cannot have its rows.")
    by_format = {
        kind: {split: files for split in splits.values() if (files := _files_of(place, split, patterns))}
        for kind, patterns in _FORMATS.items()
    }
    kind = max(by_format, key=lambda name: len(by_format[name]))
    data_files = by_format[kind]
    if scored not in data_files:
        raise ConfigError(
            f"{place} has no {scored}.jsonl (or .json, .parquet, -*.parquet; all of one kind), which "
            f"{definition['task']} needs."
        )
    settings = {name: split if split in data_files else None for name, split in splits.items()}
    if num_fewshot:
        settings |= _split_of_examples(settings, scored)
    return {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": data_files}, **settings}


def _split_of_examples(settings: dict[str, str | None], scored: str) -> dict[str, str]:
    """Where examples come from, and the scored split under the name by which the harness leaves a row out."""
    there = [settings[name] for name in _SPLITS if settings.get(name)]
    return {"fewshot_split": there[0] or scored, "test_split": scored}


def _files_of(place: Path, split: str, patterns: tuple[str, ...]) -> list[str]:
    found = [sorted(place.glob(pattern.format(split))) for pattern in patterns]
    return [str(path.resolve()) for path in next((paths for paths in found if paths), [])]
