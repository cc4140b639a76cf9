"""`megatron-lrc train FLAGS` runs one process of a training; torchrun starts several.

An error of the user's costs one line of stderr per error and exit code 2. Of several processes rank 0 prints;
what another rank has to say goes into torchrun's error file, which torchrun quotes in its report, and to
stderr where there is no torchrun. Exit codes: 0 done, or stopped on request with its state saved
(`train/stopping.py`), 1 a run that stopped itself (one line), a bug or a failing machine (with a traceback),
another rank's failure or absence (one line that names it, `launch/peers.py`, `launch/agreement.py`), 2 the
user's error, 128 + N ended at once by signal N, as by Ctrl-C before the first step.

Processes that torchrun starts again (--max-restarts) go on from the newest checkpoint of --save. A user's
error or a run that stopped itself would only come again: they end as before, without starting.
"""

import os
import traceback
from collections.abc import Sequence
from pathlib import Path

from megatron_lrc.commands.next_command import after_training, say_next
from megatron_lrc.config import (
    TRAINING,
    Config,
    ConfigError,
    RunFailed,
    RunStopped,
    parse_config,
    presets_of,
    take_dry_run,
    validate,
)
from megatron_lrc.console import complain, say
from megatron_lrc.launch import peers, torchrun
from megatron_lrc.launch.agreement import RanksMissing
from megatron_lrc.launch.auto_rate import with_number
from megatron_lrc.launch.environment import check_environment, prepare_cuda
from megatron_lrc.launch.interrupts import ended_by_ctrl_c
from megatron_lrc.methods import method_of


def run(argv: Sequence[str], program: str, *, only_checks: bool = False) -> int:
    """Trains, or with only_checks only refuses what cannot work; returns the process's exit code."""
    try:
        if failure := torchrun.final_failure():
            report_final_failure(*failure)
            return failure[1]
        with ended_by_ctrl_c(program):
            train(argv, program, only_checks=only_checks)
    except ConfigError as error:
        report_final_failure(str(error), 2)
        return 2
    except RunStopped as error:
        report_final_failure(str(error), 1)
        return 1
    except (RanksMissing, RunFailed) as error:  # it may go well when all are started again
        report_failure(str(error))
        return 1
    except Exception as error:
        if is_of_another_rank(error):
            return 1
        torchrun.report_failure(f"{type(error).__name__}: {error}", traceback.format_exc())
        raise
    return 0


def train(argv: Sequence[str], program: str, *, only_checks: bool) -> None:
    prepare_cuda()
    wanted, flags = (None, argv) if only_checks else take_dry_run(argv)
    check_environment(is_to_start=not only_checks and not wanted)
    world_size = (wanted and wanted.gpus) or int(os.environ.get("WORLD_SIZE", "1"))
    usage, purpose = TRAINING
    config = parse_config(flags, (usage.replace("python -m megatron_lrc train", program), purpose))
    if torchrun.restarts():
        config.checkpoint.load = checkpoint_to_restart_from(config)
    presets = presets_of(flags)
    validate(method_of(config), world_size=world_size, presets=presets)
    config, about_rate = with_number(config, world_size)
    if about_rate and os.environ.get("RANK", "0") == "0" and not only_checks:
        say(about_rate)
    config = config.resolved(world_size)

    if only_checks:  # imports torch, as the others do, so it comes after what can fail at once
        from megatron_lrc.train.start_checks import check

        check(config, world_size)
    elif wanted:
        from megatron_lrc.train.dry_run import dry_run

        dry_run(config, wanted, world_size, presets)
    else:
        from megatron_lrc.train import loop

        torchrun.end_with_torchrun()
        finished = loop.train(config, presets)
        if finished and os.environ.get("RANK", "0") == "0":
            say_next(program, after_training(*finished))


def checkpoint_to_restart_from(config: Config) -> str | None:
    """--load of a process that was started again: of what this run has saved the newest, else what was given."""
    save = config.checkpoint.save
    has_saved = save and any(Path(save).glob("iter_[0-9]*/run.json"))
    return "auto" if has_saved else config.checkpoint.load


def report_final_failure(message: str, exit_code: int) -> None:
    """To the user, torchrun and the other ranks: a failure that a new start would only bring again."""
    report_failure(message, final_exit_code=exit_code)


def report_failure(message: str, *, final_exit_code: int | None = None) -> None:
    torchrun.report_failure(message, message, final_exit_code=final_exit_code)
    if os.environ.get("RANK", "0") == "0" or not torchrun.is_used():
        for line in message.splitlines():
            complain(f"error: {line}")
    peers.explain(message, is_waiting=False)


def is_of_another_rank(error: Exception) -> bool:
    """Tell the other ranks of this one's failure. If theirs came first, say so in one line."""
    verdict = peers.explain(f"{type(error).__name__}: {error}", is_waiting=is_failed_communication(error))
    if verdict is None or peers.is_of_this_rank(verdict):
        return False
    peers.end_with(verdict)
    return bool(verdict.ranks)  # otherwise nobody knows, and the traceback may help


def is_failed_communication(error: BaseException) -> bool:
    """Whether communication failed, which it does when another rank has gone or does not come."""
    is_communication = isinstance(error, RuntimeError) and (
        type(error).__name__.startswith("Dist") or "gloo" in str(error) or "NCCL" in str(error)
    )
    before = error.__cause__ or error.__context__
    return is_communication or (before is not None and is_failed_communication(before))
