"""The line with which a command ends: what is usually done next, with this one's paths, ready for the shell.

Each function takes what its command knows and gives the commands that follow it, as (name, flags). `say_next` spells
them the way the user called this one: as files of tools/, `megatron-lrc`, or `python -m megatron_lrc`. What the line
cannot know stands in it in capitals, as in the README.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrc.config import Config
from megatron_lrc.console import say
from megatron_lrc.data.blends import plan_data
from megatron_lrc.json_files import read_object
from megatron_lrc.methods import method_of

if TYPE_CHECKING:  # it loads torch, and --help answers without
    from megatron_lrc.checkpoints.run_directory import RunState

Command = tuple[str, Sequence[object]]
#: Where a checkout has them.
FILES = {
    "preprocess": "tools/preprocess_data.py",
    "train": "examples/pretrain_lrc.sh",
    "convert-to-hf": "tools/convert_to_hf.py",
    "evaluate": "tools/evaluate.py",
    "report": "tools/report.py",
}


def say_next(program: str, commands: Sequence[Command]) -> None:
    """One line, or none. program: what the user called, as `run_command` has it."""
    if commands:
        spelled = (_spell(program, name) + [str(flag) for flag in flags] for name, flags in commands)
        say(f"next: {' && '.join(map(shlex.join, spelled))}")


def _spell(program: str, name: str) -> list[str]:
    """The words that call a command, by the interpreter that runs this one."""
    if program.startswith("megatron-lrc "):
        return ["megatron-lrc" if shutil.which("megatron-lrc") else sys.argv[0], name]
    if program.startswith("python -m "):
        return [_interpreter("python", "python3"), "-m", "megatron_lrc", name]
    file = os.path.normpath(Path(sys.argv[0]).parent.parent / FILES[name])
    if not file.endswith(".sh"):
        return [_interpreter("python", "python3"), file]
    python = _interpreter("python3")  # which the script takes by itself
    return [*([] if python == "python3" else ["env", f"PYTHON={python}"]), "bash", file]


def _interpreter(*names: str) -> str:
    """The first of these names that PATH finds in the folder of this interpreter; else its path."""
    folder = os.path.dirname(sys.executable)
    found = (name for name in names if os.path.dirname(shutil.which(name) or "") == folder)
    return next(found, sys.executable)


# ------------------------------------------------------------------------------------------------ what follows


def after_indexing(prefixes: Sequence[str]) -> list[Command]:
    """Training on datasets; the teacher is the model whose tokenizer has made them, where that is known."""
    teacher = _tokenizer_of(prefixes[0])
    sizes = _read_json(Path(teacher) / "config.json") if teacher else {}
    width, longest = (_positive(sizes.get(name)) for name in ("hidden_size", "max_position_embeddings"))
    flags = ["--teacher", teacher if width else "TEACHER", "--student-hidden-size", width // 2 if width else "N"]
    flags += ["--seq-length", longest] if longest and longest < Config().training.seq_length else []
    run = Path("runs") / Path(prefixes[0]).name.removesuffix("_document")
    return [("train", [*flags, "--data-path", *prefixes, "--train-epochs", 1, "--save", run])]


def after_conversion(directory: Path) -> list[Command]:
    """Text for the new teacher."""
    flags = ["--input", "TEXT", "--output-prefix", "data/corpus", "--tokenizer-model", directory, "--append-eod"]
    return [("preprocess", [*flags, "--workers", os.cpu_count() or 1])]


def after_training(config: Config, state: "RunState") -> list[Command]:
    """Of a run that has come to its end: the export, where there is a student, and the report."""
    run = config.checkpoint.save
    if run is None:
        return []
    export = f"{run.rstrip('/')}-hf"
    is_there = ["--force"] if os.path.exists(export) else []
    commands: list[Command] = [("report", [run])]
    if not method_of(config).why_no_student(Path(run), state.step, state.changed_at):
        commands.insert(0, ("convert-to-hf", ["--load", run, "--output", export, *is_there]))
    return commands


def after_export(config: Config, teacher: Path, output: Path) -> list[Command]:
    """The evaluation on the held-out part of the run's data. teacher: what the student was made from."""
    plan = plan_data(config)
    blend = plan.valid or plan.train
    if blend is None:
        return []
    has_part = plan.valid is not None and bool(config.data.data_path)
    part = ["--split", config.data.split] if has_part else ["--eval-split", "all"]
    flags = [output, "--data-path", *map(_shown, blend.prefixes), *part, "--seq-length", config.training.seq_length]
    is_comparable = method_of(config).has_teacher and any(teacher.glob("*.safetensors"))
    return [("evaluate", [*flags, *(["--teacher", _shown(teacher)] if is_comparable else [])])]


def after_evaluation(model: Path) -> list[Command]:
    """Of a run directory, its report."""
    return [("report", [model])] if (model / "metrics.jsonl").is_file() else []


def _tokenizer_of(prefix: str) -> str | None:
    """What the manifest beside a dataset names."""
    tokenizer = _read_json(Path(f"{prefix}.json")).get("tokenizer")
    model = tokenizer.get("model") if isinstance(tokenizer, dict) else None
    return model if isinstance(model, str) else None


def _read_json(path: Path) -> dict:
    """Of a file that only helps to say more."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def _positive(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _shown(path: object) -> str:
    """Relative to where we are, if it lies below."""
    whole, here = os.path.abspath(str(path)), os.getcwd()
    return os.path.relpath(whole, here) if whole.startswith(here + os.sep) else whole
