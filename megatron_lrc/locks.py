"""One process at a time writes to a place: a file that is locked, and says by whom.

The kernel's flock, where the file system has it, ends with the process, however that ends. Some file systems have none,
and on some (Lustre with localflock, GPFS) it counts within one machine only. So the file also names its owner: on this
machine the owner's process is looked for, and on another one it shows that it lives by touching the file.

    on this machine    free at once when the owner is dead, and taken as long as it is not
    on another one     free when it has not touched the file for SILENCE seconds, which a new process waits for;
                       taken where it does

Age is counted by the file system's clock, since those of two machines may differ.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import psutil

from megatron_lrc.config import ConfigError
from megatron_lrc.console import say
from megatron_lrc.json_files import parse_json

#: Seconds between two signs of life, and after how many without one an owner elsewhere counts as dead.
BEAT, SILENCE = 10.0, 60.0
#: What flock says where the file system has none.
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK}


def _machine() -> str:
    """This start of this machine's kernel, which containers share."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that holds a lock. started: its own start, in seconds of the epoch; since: when it took the lock."""

    host: str = field(default_factory=socket.gethostname)
    machine: str = field(default_factory=_machine)
    pid: int = field(default_factory=os.getpid)
    started: float = field(default_factory=lambda: psutil.Process().create_time())
    since: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_of_this_machine(self) -> bool:
        return self.machine == _machine()

    @property
    def is_alive(self) -> bool:
        """Of an owner on this machine. A process of the same number that began at another time is not it."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1.0
        except (psutil.Error, TypeError, ValueError):  # no such process, or no such number
            return False


class FileLock:
    """path: of the file, which goes when the lock does. place: what it guards, and remedy: what to do instead, both for
    the sentence to a second process."""

    def __init__(self, path: str | Path, *, place: str, remedy: str):
        self.path, self._place, self._remedy = Path(path), place, remedy
        self._file: int | None = None
        self._end = threading.Event()

    def __enter__(self) -> "FileLock":
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Unless it is held already. ConfigError if another process has it; where there can be no such file, the work
        goes on without, in a warning."""
        if self._file is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._wait_for_it()
        except OSError as error:
            say(f"warning: {self.path} cannot be written ({error.strerror}): nothing keeps a second process away")
            return
        threading.Thread(target=self._beat, args=(self._end,), name="lock", daemon=True).start()
        _held.add(self)

    def release(self) -> None:
        if self._file is None:
            return
        _held.discard(self)
        self._end.set()
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._file), os.stat(self.path)):
                self.path.unlink()  # while it is locked, so nobody else's goes
        self.forget()

    def forget(self) -> None:
        """Close it, no more: all that a forked child may do, with which the lock would live on otherwise."""
        if self._file is not None:
            os.close(self._file)
        self._file, self._end = None, threading.Event()

    def _wait_for_it(self) -> int:
        """The file, locked and with this process's name in it."""
        touched: float | None = None
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # anew: NFS looks only then
            try:
                touched = self._last_sign(file, touched)
                if touched is None and self._write_owner(file):
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)
            time.sleep(0.0 if touched is None else 1.0)

    def _last_sign(self, file: int, before: float | None) -> float | None:
        """None if the file is this process's to take, else when an owner that may be dead last touched it. ConfigError
        if the owner is alive. before: what this gave a moment ago."""
        is_locked, is_known = _try_flock(file)
        owner = _read_owner(file)
        if owner is None or owner.is_of_this_machine:
            if is_locked or (owner and not is_known and owner.is_alive):
                raise self._refusal(owner)
            return None
        touched = os.fstat(file).st_mtime
        silence = _clock_of(self.path.parent) - touched
        if before not in (None, touched) or (silence > SILENCE and is_locked):
            raise self._refusal(owner, silence)
        if silence > SILENCE:
            return None
        if before is None:
            say(f"{self._place}: waits up to {SILENCE:.0f} s for a sign of life of its last writer ({owner})")
        return touched

    def _write_owner(self, file: int) -> bool:
        """Whether the file is this process's now."""
        mine = json.dumps(asdict(Owner())).encode() + b"\n"
        with contextlib.suppress(OSError):  # a full disk: the kernel's lock is enough on this machine
            os.ftruncate(file, 0)
            os.pwrite(file, mine, 0)
        if not _try_flock(file)[1]:  # another process may be at the very same point
            time.sleep(0.1)
            return self.path.read_bytes() == mine
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(file), os.stat(self.path))  # else its owner removed it meanwhile
        return False

    def _refusal(self, owner: Owner | None, silence: float = 0.0) -> ConfigError:
        who = f"another process ({owner})" if owner else "another process"
        doubt = f" It last showed a sign of life {silence:.0f} s ago: if it is dead, remove {self.path}."
        is_in_doubt = owner is not None and not owner.is_of_this_machine
        return ConfigError(f"{self._place} is being written by {who}. {self._remedy}{doubt if is_in_doubt else ''}")

    def _beat(self, end: threading.Event) -> None:
        while not end.wait(BEAT):
            with contextlib.suppress(OSError):  # the file system may have become read-only
                os.utime(self.path)


def lock_of_run(run: Path) -> FileLock:
    """RUN/.lock: for who trains there, or would move the directory."""
    return FileLock(run / ".lock", place=f"--save {run}", remedy="Wait until it has ended, or save elsewhere.")


#: Locks of this process.
_held: set[FileLock] = set()


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget_all)


def _try_flock(file: int) -> tuple[bool, bool]:
    """Whether another process has locked the file, and whether the file system knows such locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True, True
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return False, False
    return False, True


def _read_owner(file: int) -> Owner | None:
    """None if nobody's name is in it, or what is in it cannot be read."""
    try:
        return Owner(**parse_json(os.pread(file, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _clock_of(folder: Path) -> float:
    """The time, as the file system has it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime
