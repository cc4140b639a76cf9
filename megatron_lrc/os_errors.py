"""What the operating system refuses, in a sentence that says what to do: one table for all that reads and writes.

An OSError says nothing of what is in a file: it is no damage, and removing the file is no remedy.
"""

import errno
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from megatron_lrc.config import ConfigError

#: Descriptors are not wanted without end: programs that are started may look at each that there may be.
_MOST_FILES = 1 << 20
_NO_ROOM = "Make room there, or use another place."
_NOT_ALLOWED = "Give this user the right to it (ls -l shows who has it), or use another place."
_REMEDIES = {
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: "Have the file system mounted for writing again, or use another place.",
    errno.ENOENT: "Correct the path; if other machines see it, give a folder that all of them share.",
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.ENFILE: "The whole machine has too many files open: end what is not needed, or raise fs.file-max.",
    errno.ESTALE: "It was replaced on its file server, or that was started again: start once more, and if it comes "
    "again have the file system mounted anew.",
    errno.EIO: "The disk or the file server fails: look at the kernel's messages (dmesg), and use another copy.",
    errno.ENOMEM: "There is no memory, or no address space, for it: look at ulimit -v and vm.max_map_count.",
}


def explain(error: OSError, where: str | None = None) -> str:
    """One sentence, and the remedy where there is one. where: what was read or written, if the error does not say."""
    where = where or error.filename
    if error.strerror is None or where is None:
        return str(error)
    return " ".join(filter(None, [f"{os.fsdecode(where)}: {error.strerror}.", _remedy(error)]))


def _remedy(error: OSError) -> str:
    if error.errno == errno.EMFILE:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"This process may have {soft:,} files open, and may not raise that over {hard:,}: raise the limit (ulimit "
            "-n, LimitNOFILE= of a service, --ulimit nofile= of a container), or open fewer files at a time."
        )
    if error.errno == errno.ENOENT:
        return f"{_REMEDIES[errno.ENOENT]} This machine is {socket.gethostname()}."
    return _REMEDIES.get(error.errno or 0, "")


@contextmanager
def explained() -> Iterator[None]:
    """An OSError of the block, or of the function that it decorates, as a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(explain(error)) from error


def raise_file_limit() -> None:
    """Let this process, and what it starts, have as many files open as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
