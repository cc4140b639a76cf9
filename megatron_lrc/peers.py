"""When one rank of a run fails, all end within seconds, and each says which one it was.

Every rank holds a TCP connection to rank 0. The kernel closes a process's connections however it ends, so rank 0 hears
of every end at once and says so to all: also where the backend would wait on (NCCL until its timeout, gloo as long as
a data loader lives that has inherited the connection). Before that it asks every rank whether it is there: who stops
without ending (a stopped process, a machine that hangs) shows only in the others' waiting in vain.

Who is told ends by itself if it can (an exception out of a collective), else its thread ends it. This module knows no
torch: `mcore/distributed.py` hands rank 0's address round, `__main__.py` reports failures.

A line is one JSON object. To rank 0: {rank, host, token}, {failed, is_waiting}, {at}, {bye}. From it: {ask},
{verdict, ranks}, {bye}. A machine that is gone without a word is noticed by TCP's keepalive.
"""

import contextlib
import json
import multiprocessing
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrc import torchrun

#: Seconds that a rank has to say that it is there.
ANSWER_WITHIN = 2.0
#: Seconds within which a main thread notices by itself, if ever; and that it then has to end the process.
NOTICE_WITHIN, END_WITHIN = 0.05, 5.0
#: Seconds by which torchrun is to see the first failure before the others: it looks at its processes every 0.1 s.
FIRST_COMES_FIRST = 1.0
#: Silence after which a machine counts as gone: seconds to the first probe, between probes, number of probes.
KEEPALIVE = (60, 20, 6)
#: Ranks named in one sentence; characters of a failure; bytes of a line.
NAMED, LONGEST_FAILURE, LONGEST_LINE = 8, 400, 1 << 14
PACKAGE = str(Path(__file__).parent)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ended the run. ranks: whose doing it was; empty where nobody knows."""

    text: str
    ranks: tuple[int, ...] = ()


class Connection:
    """A socket for JSON objects, one a line."""

    def __init__(self, end: socket.socket):
        self._end, self._buffer = end, b""
        _open.append(end)

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the other end is gone; its reader notices
            self._end.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come by now, at least some bytes; None at the end. Waits."""
        try:
            data = self._end.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > LONGEST_LINE:
            raise ValueError("not a line of this protocol")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        _open.remove(self._end)
        self._end.close()


@dataclass(eq=False, slots=True)
class _Rank:
    """What rank 0 knows of one."""

    number: int = -1  # until it has introduced itself
    name: str = ""
    at: str = ""  # its answer
    failure: str = ""
    is_waiting: bool = False  # it failed because it waited in vain for others


class Hub(threading.Thread):
    """Rank 0's end of all connections, its own included."""

    def __init__(self, is_one_machine: bool):
        super().__init__(name="peers-hub", daemon=True)
        if is_one_machine:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        elif socket.has_dualstack_ipv6():
            self._listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        else:
            self._listener = socket.create_server(("", 0), backlog=4096)
        _open.append(self._listener)
        self._token = secrets.token_hex(8)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._ranks: dict[Connection, _Rank] = {}
        self._failed: list[_Rank] = []  # in the order in which rank 0 heard of it
        self._deadline: float | None = None
        self._is_over = False

    @property
    def address(self) -> dict[str, Any]:
        """What a rank needs to connect."""
        return {"port": self._listener.getsockname()[1], "token": self._token, "host": socket.gethostname()}

    def run(self) -> None:
        while not self._is_over and not self._is_time_to_judge():
            wait = None if self._deadline is None else max(self._deadline - time.monotonic(), 0)
            for key, _ in self._selector.select(wait):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.fileobj)  # type: ignore[arg-type]
        if self._is_over:
            self._tell(bye=True)
        else:
            verdict = self._judge()
            self._tell(verdict=verdict.text, ranks=verdict.ranks)

    def _accept(self) -> None:
        end, _ = self._listener.accept()
        _keep_alive(end)
        connection = Connection(end)
        self._ranks[connection] = _Rank()
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: Connection) -> None:
        rank = self._ranks[connection]
        try:
            messages = connection.receive()
            for message in messages or []:
                self._take(rank, message)
        except (ValueError, KeyError, TypeError, PermissionError):  # not one of ours
            messages = None
        if messages is None or any("bye" in message for message in messages):
            self._selector.unregister(connection)
            del self._ranks[connection]
            connection.close()
        if messages is None and rank.number >= 0:
            self._note(rank, f"{rank.name} died")

    def _take(self, rank: _Rank, message: dict[str, Any]) -> None:
        if rank.number < 0:
            if message["token"] != self._token:
                raise PermissionError
            rank.number, rank.name = int(message["rank"]), f"rank {message['rank']} ({message['host']})"
        elif "failed" in message:
            self._note(rank, f"{rank.name} failed: {message['failed']}", is_waiting=message["is_waiting"])
        elif "at" in message:
            rank.at = message["at"]
        elif rank.number == 0:
            self._is_over = True  # rank 0 is through

    def _note(self, rank: _Rank, failure: str, *, is_waiting: bool = False) -> None:
        if rank.failure:
            return
        rank.failure, rank.is_waiting = failure, is_waiting
        self._failed.append(rank)
        if self._deadline is None:
            self._deadline = time.monotonic() + ANSWER_WITHIN
            self._tell(ask=True)

    def _tell(self, **message: Any) -> None:
        for connection in self._ranks:
            connection.send(**message)

    def _is_time_to_judge(self) -> bool:
        have_answered = all(rank.at or rank.number < 0 for rank in self._ranks.values())
        return self._deadline is not None and (have_answered or time.monotonic() >= self._deadline)

    def _judge(self) -> Verdict:
        if causes := [rank for rank in self._failed if not rank.is_waiting]:
            return _verdict(causes, [rank.failure for rank in causes])
        present = sorted((rank for rank in self._ranks.values() if rank.number >= 0), key=lambda rank: rank.number)
        if silent := [rank for rank in present if not rank.at]:
            return _verdict(silent, [f"{rank.name} does not answer" for rank in silent])
        places = [f"{rank.name} in {rank.at}" for rank in present]
        return Verdict("; ".join([self._failed[0].failure, "all ranks answer", *_few(places)]))


class Peers:
    """One rank's connection to rank 0, and the thread that listens to it."""

    def __init__(self, rank: int, address: dict[str, Any]):
        self._rank_0 = f"rank 0 ({address['host']})"
        self.rank = rank
        self._verdict: Verdict | None = None
        self._is_decided, self._is_over, self._is_ending = (threading.Event() for _ in range(3))
        self._said = threading.Lock()
        end = _connect(address["host"], address["port"])
        _keep_alive(end)
        self._connection = Connection(end)
        self._connection.send(rank=rank, host=socket.gethostname(), token=address["token"])
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
            print(f"error: {text}", file=sys.stderr, flush=True)
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
                    self._connection.send(at=where_the_main_thread_is())
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


def _verdict(ranks: list[_Rank], texts: list[str]) -> Verdict:
    return Verdict("; ".join(_few(texts)), tuple(rank.number for rank in ranks))


def _few(texts: list[str]) -> list[str]:
    return texts if len(texts) <= NAMED else [*texts[:NAMED], f"and {len(texts) - NAMED} more ranks"]


def _connect(host: str, port: int) -> socket.socket:
    """To rank 0 by its name, or by the one that torchrun reaches the first node by. OSError."""
    names = ["127.0.0.1"] if host == socket.gethostname() else [host, os.environ.get("MASTER_ADDR", host)]
    for name in names:
        with contextlib.suppress(OSError):
            end = socket.create_connection((name, port), timeout=10)
            end.settimeout(None)
            return end
    raise OSError(f"rank 0 cannot be reached at {' or '.join(names)}, port {port}")


def _keep_alive(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
    for name, value in zip(names, KEEPALIVE, strict=True):
        if hasattr(socket, name):  # not on every system
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def where_the_main_thread_is() -> str:
    """The innermost line of this package that the main thread is in, as train/step.py:173."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{os.path.relpath(frame.f_code.co_filename, PACKAGE)}:{frame.f_lineno}" if frame else "no line of ours"


#: Sockets that a forked child has to be rid of: with its copies the end of its parent would go unnoticed.
_open: list[socket.socket] = []


def _close_all() -> None:
    for end in _open:
        end.close()
    _open.clear()


os.register_at_fork(after_in_child=_close_all)
