"""The stages, the most informative first, and what runs them: `tools/gpu_check.py`."""

import argparse
import gc
import json
import logging
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.gpu_check.checks import Checks
from benchmarks.gpu_check.settings import Settings
from benchmarks.gpu_check.stages import Record, Stage, run_stages
from benchmarks.gpu_check.table import lines_of
from megatron_lrc.config import ConfigError, check_directory, raise_all


def checks_of(module: str) -> Callable[[Settings], Checks]:
    """Of a module that is imported when its turn comes: most need megatron-core, which a Transformer Engine that is
    broken keeps from being imported."""

    def checks(settings: Settings) -> Checks:
        yield from import_module(f"benchmarks.gpu_check.{module}").checks(settings)

    return checks


STAGES = (
    Stage("machine", 30, checks_of("machine")),
    Stage("operators", 45, checks_of("operators")),
    Stage("small model", 120, checks_of("paired")),
    Stage("speed", 270, checks_of("speed")),
    Stage("resuming", 60, checks_of("resuming")),
    Stage("training", 60, checks_of("training")),
)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """0, or 1 where a check failed or a stage ran over its time. ConfigError where nothing can be checked."""
    check_arguments(arguments)
    chosen = [stage for stage in STAGES if not arguments.stages or stage.name in arguments.stages]
    logging.getLogger("megatron_lrc.data").setLevel(logging.ERROR)  # the data made here is without a manifest
    about = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "arguments": vars(arguments)}
    gc.freeze()  # what has been imported stays, and need not be looked through after each stage
    record = Record(Path(arguments.json), about, say)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            device=arguments.device,
            is_tiny=arguments.tiny,
            needs_engine=not arguments.without_te,
            teacher=arguments.teacher,
            seconds=60 * arguments.minutes,
            folder=Path(folder),
        )
        run_stages(chosen, settings, record)
    for line in lines_of(json.loads(Path(arguments.json).read_text(encoding="utf-8"))):
        say(line)
    say(f"all of it is in {arguments.json}")
    return 0 if record.is_good else 1


def check_arguments(arguments: argparse.Namespace) -> None:
    names = [stage.name for stage in STAGES]
    if unknown := set(arguments.stages) - set(names):
        raise ConfigError(f"--stages {' '.join(sorted(unknown))}: expected are any of {', '.join(names)}.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"torch {torch.__version__} sees no CUDA GPU here. Run this on a machine that has one, with a CUDA build "
            "of torch; or try it out with --device cpu --tiny."
        )
    if arguments.device == "cpu" and not arguments.tiny:
        raise ConfigError("--device cpu would take hours at the sizes of LRC-1.5B. Add --tiny.")
    if arguments.teacher:
        raise_all(list(check_directory("--teacher", arguments.teacher)))
