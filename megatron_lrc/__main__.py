"""`python -m megatron_lrc train FLAGS` runs a training process; `check FLAGS` only refuses what cannot work. No logic.

An error of the user's costs one line of stderr per error and exit code 2. Of several processes rank 0 prints; what
another rank has to say goes into torchrun's error file, which torchrun quotes in its report, and to stderr where
there is no torchrun. Exit codes: 0 done, or stopped on request with its state saved (`train/stopping.py`), 1 a run that
stopped itself (one line), a bug or a failing machine (with a traceback), 2 the user's error, 128 + N ended at once by
signal N.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence

from . import __version__
from .arguments import TRAINING, parse_config
from .config import ConfigError, RunStopped
from .validation import validate

USAGE = """usage: python -m megatron_lrc COMMAND FLAGS

Commands:
  train   one process of a training run; several are started by torchrun (see examples/pretrain_lrc.sh)
  check   checks flags, teacher and data as train would, starts nothing

`python -m megatron_lrc train --help` explains every flag. `python -m megatron_lrc --version` prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        report_user_error(str(error))
        return 2
    except RunStopped as error:
        report_user_error(str(error))
        return 1
    except Exception as error:
        write_error_file(f"{type(error).__name__}: {error}", traceback.format_exc())
        raise
    return 0


def run(argv: Sequence[str]) -> None:
    command, *flags = argv or [""]
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "--version":
        print(f"megatron_lrc {__version__}")
    elif command in ("train", "check"):
        run_command(command, flags)
    else:
        raise ConfigError(f"unknown command {command!r}: use train or check, as in python -m megatron_lrc train FLAGS")


def run_command(command: str, flags: Sequence[str]) -> None:
    # Megatron's overlap of TP communication with computation needs one hardware queue. CUDA reads this at its start.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = parse_config(flags, (TRAINING[0].replace(" train ", f" {command} "), TRAINING[1]))
    validate(config, world_size=world_size)
    config = config.resolved(world_size)

    from .train import loop  # imports torch, so it comes after what can fail at once

    if command == "check":
        loop.check(config, world_size)
    else:
        loop.train(config)


def report_user_error(message: str) -> None:
    under_torchrun = write_error_file(message, message)
    if os.environ.get("RANK", "0") == "0" or not under_torchrun:
        for line in message.splitlines():
            print(f"error: {line}", file=sys.stderr)


def write_error_file(message: str, details: str) -> bool:
    """Leaves the failure where torchrun looks for it (torch.distributed.elastic's format); False without torchrun."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    extra = {"py_callstack": details, "timestamp": str(int(time.time()))}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)
    return True


if __name__ == "__main__":
    sys.exit(main())
