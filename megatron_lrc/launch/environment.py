"""What a launcher says in the environment of each process: which of how many it is, and where they meet."""

import os
import socket
import time
from collections.abc import Mapping

from megatron_lrc.config import ConfigError

#: Seconds in which a name may become known: a cluster may publish a machine's name after it has started.
RESOLVED_WITHIN = 30.0
_REMEDY = "Start the processes with torchrun (examples/pretrain_lrc.sh does), or unset what is left of another start."


def check_environment(environment: Mapping[str, str] = os.environ, *, is_to_start: bool) -> None:
    """ConfigError for variables of a launcher's that are no numbers, contradict each other, or are too few.

    is_to_start: False for what only calculates, to which WORLD_SIZE alone says for how many processes.
    """
    size, rank = _number(environment, "WORLD_SIZE", least=1), _number(environment, "RANK", least=0)
    _number(environment, "LOCAL_RANK", least=0)
    port = _number(environment, "MASTER_PORT", least=0)
    if port is not None and port > 65535:
        raise ConfigError(f"MASTER_PORT is {port}; a port is at most 65535. {_REMEDY}")
    if not is_to_start:
        return
    if rank is None and size not in (None, 1):
        raise ConfigError(f"WORLD_SIZE is {size}, but RANK, which of them this process is, is not set. {_REMEDY}")
    if rank is not None:
        wanted = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if size != 1 else ()  # one alone meets nobody
        if lacking := [name for name in wanted if not environment.get(name)]:
            verb = "are" if len(lacking) > 1 else "is"
            raise ConfigError(f"RANK is {rank}, but {' and '.join(lacking)} {verb} not set. {_REMEDY}")
        if size is not None and rank >= size:
            raise ConfigError(f"RANK is {rank} and WORLD_SIZE {size}; ranks are from 0 to {size - 1}. {_REMEDY}")


def prepare_cuda() -> None:
    """What CUDA and torch's allocator read of the environment when they start, unless the user has set it."""
    # Megatron's overlap of TP communication with computation needs one hardware queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Otherwise blocks of many sizes (chunks of logits, validations, a student that is opened) leave gaps that nothing
    # fits into. torch before 2.9 knows the first name only.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def _number(environment: Mapping[str, str], name: str, *, least: int) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise ConfigError(f"{name} is {text[:40]!r}; a whole number of at least {least} is expected. {_REMEDY}")
    return int(text)


def await_name(host: str, within: float) -> str | None:
    """Why the name of a machine is not known; None when it is. Tries again for so many seconds."""
    end = time.monotonic() + within
    while True:
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= end:
                return getattr(error, "strerror", None) or str(error)
            time.sleep(min(1.0, within))
        else:
            return None
