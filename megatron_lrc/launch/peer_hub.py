"""Rank 0's part of `peers.py`: it hears of every rank's end, judges which one ended the run, and tells all.

A line is one JSON object. To rank 0: {rank, host, token}, {failed, is_waiting}, {at}, {bye}. From it: {welcome}, {ask},
{verdict, ranks}, {bye}. A machine that is gone without a word is noticed by TCP's keepalive.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

ANSWER_WITHIN = 2.0  # seconds that a rank has to say that it is there
#: Silence after which a machine counts as gone: seconds to the first probe, between probes, number of probes.
KEEPALIVE = (60, 20, 6)
NAMED, LONGEST_LINE = 8, 1 << 14  # ranks in one sentence; bytes of a line


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
        else:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=4096)
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
        keep_alive(end)
        connection = Connection(end)
        self._ranks[connection] = _Rank()
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: Connection) -> None:
        rank = self._ranks[connection]
        try:
            messages = connection.receive()
            for message in messages or []:
                self._take(connection, rank, message)
        except (ValueError, KeyError, TypeError, PermissionError):  # not one of ours
            messages = None
        if messages is None or any("bye" in message for message in messages):
            self._selector.unregister(connection)
            del self._ranks[connection]
            connection.close()
        if messages is None and rank.number >= 0:
            self._note(rank, f"{rank.name} died")

    def _take(self, connection: Connection, rank: _Rank, message: dict[str, Any]) -> None:
        if rank.number < 0:
            if message["token"] != self._token:
                raise PermissionError
            rank.number, rank.name = int(message["rank"]), f"rank {message['rank']} ({message['host']})"
            connection.send(welcome=True)
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
        """Rank 0 last: it may end as soon as it hears, and this thread with it."""
        for connection, _ in sorted(self._ranks.items(), key=lambda item: item[1].number == 0):
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


def _verdict(ranks: list[_Rank], texts: list[str]) -> Verdict:
    return Verdict("; ".join(_few(texts)), tuple(rank.number for rank in ranks))


def _few(texts: list[str]) -> list[str]:
    return texts if len(texts) <= NAMED else [*texts[:NAMED], f"and {len(texts) - NAMED} more ranks"]


def keep_alive(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
    for name, value in zip(names, KEEPALIVE, strict=True):
        if hasattr(socket, name):  # not on every system
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


#: Sockets that a forked child has to be rid of: with its copies the end of its parent would go unnoticed.
_open: list[socket.socket] = []


def _close_all() -> None:
    for end in _open:
        end.close()
    _open.clear()


os.register_at_fork(after_in_child=_close_all)
