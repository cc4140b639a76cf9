"""What a training process and torchrun tell each other: failures, and whether to start the processes again.

torchrun (`--max-restarts N`) starts all processes again when one fails, whatever its exit code. A failure
that would only come again is marked as final in the error file, beside which those of earlier attempts lie
(.../attempt_0/RANK/error.json): the processes of the next attempt find it and end at once in the same words.
"""

import contextlib
import ctypes
import json
import os
import signal
import time
from pathlib import Path

from megatron_lrc.json_files import read_object

_FINAL_EXIT_CODE = "megatron_lrc_exit_code"
_PR_SET_PDEATHSIG = 1


def is_used() -> bool:
    return "TORCHELASTIC_ERROR_FILE" in os.environ


def restarts() -> int:
    """How often torchrun has started this run's processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def end_with_torchrun() -> None:
    """Have this process get SIGTERM, so that it saves and ends, when torchrun dies before it.

    Nobody else would end it, and it would write to a run directory in which the run goes on elsewhere.
    """
    if is_used():
        end_with_parent(signal.SIGTERM)


def end_with_parent(signal: int) -> None:
    """Have this process get `signal` when the one that started it ends, however that ends. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal)


def report_failure(message: str, details: str, *, final_exit_code: int | None = None) -> None:
    """Leave the failure where torchrun looks for it (torch.distributed.elastic's format).

    final_exit_code: with this, the process that ends with this code is not to be started again.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": details, "timestamp": str(int(time.time()))}
    values: dict[str, object] = {"message": {"message": message, "extraInfo": extra}}
    if final_exit_code is not None:
        values[_FINAL_EXIT_CODE] = final_exit_code
    with (
        contextlib.suppress(OSError),
        open(path, "w", encoding="utf-8") as file,
    ):  # a full disk hides no failure: it is printed too
        json.dump(values, file)


def final_failure() -> tuple[str, int] | None:
    """Message and exit code of the failure, on this machine, after which nothing was to be started again."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or not restarts():
        return None
    attempts = Path(path).parents[2]
    for file in sorted(attempts.glob(f"attempt_{restarts() - 1}/*/error.json")):
        try:
            values = read_object(file)
            if _FINAL_EXIT_CODE in values:
                return values["message"]["message"], int(values[_FINAL_EXIT_CODE])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            continue  # half written: the process was killed
    return None
