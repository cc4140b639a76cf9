"""Low-Rank Clone from Python: the commands' own work, without their processes and exit codes.

    from megatron_lrc import api

    config = api.configure(teacher="TEACHER", student_hidden_size=64, data_path=["DATA"], train_iters=10, save="RUN")
    api.compose(config)                  # the untrained student, a model of transformers
    run = api.train(config)              # the whole run; run.records and run.validations are what it has logged
    api.export(run, "STUDENT")           # for AutoModelForCausalLM.from_pretrained

What is here keeps its name and meaning between minor versions; everything else in the package is its inside. All of it
runs in one process or in each of those that torchrun has started. `examples/from_python.py` is a whole program.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_lrc.config import (
    Config,
    ConfigError,
    RunFailed,
    RunStopped,
    TrainingConfig,
    flag_of,
    parse_config,
    validate,
)
from megatron_lrc.methods import method_of

__all__ = ["Config", "ConfigError", "RunFailed", "RunStopped", "TrainedRun", "compose", "configure", "export", "train"]


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """directory: --save, None without. is_finished: False if it was stopped before its last step, as by a signal.
    records, validations: the lines of metrics.jsonl and validation.jsonl (`train/metrics.py` says what is in them);
    empty without a directory."""

    directory: Path | None
    is_finished: bool
    records: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)


def configure(*, preset: str | Sequence[str] = (), **settings: Any) -> Config:
    """The settings of a run, each by its flag's name with underscores: `--student-hidden-size 64` is
    student_hidden_size=64, a flag without a value is True, `--no-FLAG` is False, and None leaves the default. `config`
    may name a YAML file, over which the others win. ConfigError with one line per problem, as the command has it.
    """
    names = [preset] if isinstance(preset, str) else list(preset)
    flags = ["--preset", *names] if names else []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(flag_of(name) if value else f"--no-{flag_of(name).removeprefix('--')}")
        elif isinstance(value, (list, tuple)):
            flags += [flag_of(name), *map(str, value)]
        elif value is not None:
            flags += [flag_of(name), str(value)]
    config = parse_config(flags)
    validate(method_of(config), world_size=_world_size(), presets=names)
    return config


def train(config: Config) -> TrainedRun:
    """The whole run, as `megatron-lrc train` makes it: validations, records, checkpoints, going on with load="auto".

    ConfigError: what was asked for cannot be done, before anything is built. RunStopped: the run's own guard has ended
    it, its state saved. RunFailed: another rank has failed. Signals ask for a stop while it runs, and do what they did
    before once it is over. On all ranks alike; records are those that the main rank has written.
    """
    from megatron_lrc.launch.auto_rate import with_number
    from megatron_lrc.launch.environment import check_environment, prepare_cuda
    from megatron_lrc.train import loop

    prepare_cuda()
    check_environment(is_to_start=True)
    validate(method_of(config), world_size=_world_size())
    config, _ = with_number(config, _world_size())
    finished = loop.train(config.resolved(_world_size()), ends_process=False)
    if config.checkpoint.save is None:
        return TrainedRun(None, finished is not None)
    from megatron_lrc.train.jsonl import read_records

    directory = Path(config.checkpoint.save)
    logs = [
        list(read_records(directory / name)) if (directory / name).exists() else []
        for name in ("metrics.jsonl", "validation.jsonl")
    ]
    return TrainedRun(directory, finished is not None, *logs)


def export(run: TrainedRun | str | Path, output: str | Path, **options: Any) -> Path:
    """Write the student of a run's newest checkpoint as a Hugging Face directory, and hold its logits against the
    student's. In one process. options: those of `export_saved` in `megatron_lrc/verify/exporting.py`, as in
    dtype=torch.bfloat16 or force=True.
    ConfigError if something of it is missing or damaged, or the output is there already.
    """
    from megatron_lrc.train.metrics import last_validation
    from megatron_lrc.verify.exporting import export_saved
    from megatron_lrc.verify.weight_streams import open_student

    directory = run.directory if isinstance(run, TrainedRun) else run
    if directory is None:
        raise ConfigError("The run was not saved, so there is nothing to export. Configure it with save=DIRECTORY.")
    student, teacher = open_student(str(directory), None)
    losses = last_validation(student.path.parent, student.state.step)
    export_saved(student, teacher, output=Path(output), losses=losses, **options)
    return Path(output)


def compose(config: Config) -> Any:
    """The student that the run would begin with, calibrated on its data where its --init asks for that: a
    PreTrainedModel of transformers, in memory. In one process. ConfigError as of `train`."""
    from megatron_lrc.data.pretrained import load_causal_model

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = replace(config.checkpoint, save=f"{folder}/run", load=None)
        logging = replace(config.logging, eval_iters=0)
        start = replace(config, checkpoint=checkpoint, logging=logging, training=_of_no_steps(config.training))
        return load_causal_model(export(train(start), f"{folder}/hf", verify=False))


def _of_no_steps(training: TrainingConfig) -> TrainingConfig:
    default = type(training)()
    others = {name: getattr(default, name) for name in ("train_samples", "train_tokens", "train_epochs")}
    return replace(training, train_iters=0, **others)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
