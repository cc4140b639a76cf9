"""When one rank of a run fails, all end within seconds, and each says which one it was.

Every rank holds a TCP connection to rank 0. The kernel closes a process's connections however it ends, so
rank 0 hears of every end at once and says so to all: also where the backend would wait on (NCCL until its
timeout, gloo as long as a data loader lives that has inherited the connection). Before that it asks every
rank whether it is there: who stops without ending (a stopped process, a machine that hangs) shows only in the
others' waiting in vain.

Who is told ends by itself if it can (an exception out of a collective), else its thread ends it. Neither
module knows torch: `mcore/distributed.py` hands rank 0's address round, `commands/train.py` reports failures.
"""

import contextlib
import multiprocessing
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megatron_lrc.console import complain
from megatron_lrc.launch import torchrun
from megatron_lrc.launch.connections import Connection, introduce
from megatron_lrc.launch.peer_hub import ANSWER_WITHIN, Verdict

CONNECT_WITHIN = 10.0  # seconds, to rank 0
#: Seconds within which a main thread notices by itself, if ever; and that it then has to end the process.
NOTICE_WITHIN, END_WITHIN = 0.05, 5.0
#: Seconds by which torchrun is to see the first failure before the others: it looks at its processes every 0.1 s.
FIRST_COMES_FIRST = 1.0
LONGEST_FAILURE = 400  # characters
PACKAGE = str(Path(__file__).parents[1])  # of megatron_lrc


class Peers:
    """One rank's connection to rank 0, and the thread that listens to it."""

    def __init__(self, rank: int, address: dict[str, Any]):
        self._rank_0 = f"rank 0 ({address['host']})"
        self.rank = rank
        self._verdict: Verdict | None = None
        self._is_decided, self._is_over, self._is_ending = (threading.Event() for _ in range(3))
        self._said = threading.Lock()
        self._connection = _connect(address, rank)
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    def explain(self, failure: str, *, is_waiting: bool) -> Verdict | None:
        """Report that this rank fails, and wait for what ended the run. None: rank 0 knows of nothing else.

        is_waiting: it fails since others have not come to a collective, so that the cause is elsewhere.
        """
        self._is_ending.set()
        self._connection.send(failed=failure[:LONGEST_FAILURE], is_waiting=is_waiting)
        if self._is_decided.wait(ANSWER_WITHIN + 1.0) or not is_waiting:
            return self._verdict
        return Verdict(f"{self._rank_0} does not answer", (0,))

    def say(self, verdict: Verdict) -> None:
        """This rank's last words, to stderr and to torchrun."""
        if self._said.acquire(blocking=False):  # once, by whichever thread comes first
            text = f"{verdict.text}; with it ends rank {self.rank} ({socket.gethostname()})"
            complain(f"error: {text}")
            torchrun.report_failure(text, text)

    def stop(self) -> None:
        """This rank is through, and nothing that happens to the others concerns it."""
        self._is_over.set()
        self._connection.send(bye=True)

    def _listen(self) -> None:
        while not self._is_over.is_set():
            messages = self._connection.receive()
            if messages is None and not self._is_over.is_set():
                self._end_with(Verdict(f"{self._rank_0} died", (0,)))
            for message in messages or []:
                if "ask" in message:
                    self._connection.send(at=main_thread_position())
                elif "verdict" in message:
                    self._end_with(Verdict(message["verdict"], tuple(message["ranks"])))
                elif "bye" in message:
                    self._is_over.set()

    def _end_with(self, verdict: Verdict) -> None:
        """Have the main thread end the process, which an exception may have told it already; else end it here."""
        self._verdict = verdict
        self._is_decided.set()
        if not self._is_ending.wait(NOTICE_WITHIN):
            self.say(verdict)  # soon, since torchrun's SIGTERM may be on its way
        time.sleep(FIRST_COMES_FIRST)
        if self._is_ending.is_set():
            time.sleep(END_WITHIN)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)


#: This process's, between `join` and `leave`.
_own: Peers | None = None


def join(rank: int, address: dict[str, Any]) -> None:
    """Have this rank told when another one fails. OSError if rank 0 cannot be reached."""
    global _own
    _own = Peers(rank, address)


def leave() -> None:
    """This rank is through."""
    global _own
    if _own:
        _own.stop()
    _own = None


def explain(failure: str, *, is_waiting: bool) -> Verdict | None:
    """`Peers.explain`; None where there are no others."""
    return _own.explain(failure, is_waiting=is_waiting) if _own else None


def end_with(verdict: Verdict) -> None:
    """Say what ended the run, and leave torchrun the time to see the rank that failed first."""
    assert _own
    _own.say(verdict)
    time.sleep(FIRST_COMES_FIRST)


def is_of_this_rank(verdict: Verdict) -> bool:
    return _own is not None and _own.rank in verdict.ranks


def _connect(address: dict[str, Any], rank: int) -> Connection:
    """To rank 0, which answers: by its name, or by the one that torchrun reaches the first node by. OSError."""
    host, port, this_host = address["host"], address["port"], socket.gethostname()
    names = [*(["127.0.0.1"] if host == this_host else []), host, os.environ.get("MASTER_ADDR", host)]
    for name in dict.fromkeys(names):
        with contextlib.suppress(OSError):
            connection = introduce(name, port, address["token"], within=CONNECT_WITHIN)
            connection.send(rank=rank, host=this_host)
            return connection
    raise OSError(f"no answer from rank 0 at {' or '.join(dict.fromkeys(names))}, port {port}")


def main_thread_position() -> str:
    """The innermost line of this package that the main thread is in, as train/step.py:173."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{os.path.relpath(frame.f_code.co_filename, PACKAGE)}:{frame.f_lineno}" if frame else "no line of ours"
