"""TCP connections between ranks, and the port at which rank 0 takes them (`peer_hub.py`, `peers.py`).

A rank first sends the token that rank 0 has given it through the process group: that many bytes, whatever they are,
and nothing of a stranger is read or parsed beyond them. Only then follow lines, each a JSON object. Strangers are
few at a time and have little time, and when the last rank has come the port is closed.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

TOKEN_BYTES = 32
WELCOME = b"megatron_lrc\n"  # rank 0's answer to the token
LONGEST_LINE = 1 << 18  # bytes; the longest is a verdict that lists thousands of ranks
#: How many strangers may be connected beside the ranks that are still to come, and for how many seconds.
MOST_STRANGERS, STRANGER_FOR = 64, 10.0
#: Silence after which a machine counts as gone: seconds to the first probe, between probes, number of probes.
KEEPALIVE = (60, 20, 6)


class Connection:
    """A socket for JSON objects, one a line, to somebody who has the token."""

    def __init__(self, end: socket.socket):
        self._end, self._buffer = end, b""
        keep_alive(end)

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the other end is gone; its reader notices
            self._end.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come by now, at least some bytes; None at the end, or if that is no line of ours. Waits."""
        try:
            data = self._end.recv(1 << 16)
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError):
            return None
        is_ours = len(self._buffer) <= LONGEST_LINE and all(isinstance(message, dict) for message in messages)
        return messages if data and is_ours else None

    def close(self) -> None:
        close(self._end)


class Entrance:
    """Rank 0's port. Who sends its token becomes a `Connection`, which is handed to `admit`.

    Its sockets are registered with `selector`, their data being what to call when they can be read.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        admit: Callable[[Connection], object],
        *,
        num_expected: int,
        is_one_machine: bool,
    ):
        self._selector, self._admit, self._num_expected = selector, admit, num_expected
        self._token = secrets.token_hex(TOKEN_BYTES // 2)
        self._listener = track(_listen(is_one_machine))
        self.address = {
            "port": self._listener.getsockname()[1],
            "token": self._token,
            "host": socket.gethostname(),
        }  # what a rank needs to connect
        self._heard: dict[socket.socket, bytes] = {}  # of strangers, the oldest first
        self._until: dict[socket.socket, float] = {}
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def deadline(self) -> float | None:
        """When (time.monotonic) the first stranger's time is over; None where there is no stranger."""
        return next(iter(self._until.values()), None)

    def turn_away_late(self) -> None:
        for end in [end for end, until in self._until.items() if until <= time.monotonic()]:
            self._turn_away(end)

    def close(self) -> None:
        """Take nobody any more. May be called again."""
        for end in list(self._heard):
            self._turn_away(end)
        if self._listener.fileno() >= 0:
            self._selector.unregister(self._listener)
            close(self._listener)

    def _accept(self) -> None:
        try:
            end = track(self._listener.accept()[0])
        except OSError:  # it is gone again, or there are too many open files: then it is still to be read
            time.sleep(0.05)
            return
        self._heard[end], self._until[end] = b"", time.monotonic() + STRANGER_FOR
        self._selector.register(end, selectors.EVENT_READ, lambda: self._hear(end))
        if len(self._heard) > self._num_expected + MOST_STRANGERS:
            self._turn_away(next(iter(self._heard)))

    def _hear(self, end: socket.socket) -> None:
        if end not in self._heard:  # turned away since select() named it
            return
        data = _received(end, TOKEN_BYTES - len(self._heard[end]))
        self._heard[end] += data
        if secrets.compare_digest(self._heard[end], self._token.encode()):
            self._let_in(end)
        # Else all of it is waited for, since an answer to a part would let the token be guessed part by part.
        elif not data or len(self._heard[end]) == TOKEN_BYTES:
            self._turn_away(end)

    def _let_in(self, end: socket.socket) -> None:
        self._forget(end)
        with contextlib.suppress(OSError):  # it is gone again, as its reader will notice
            end.sendall(WELCOME)
        self._admit(Connection(end))
        self._num_expected -= 1
        if not self._num_expected:
            self.close()

    def _turn_away(self, end: socket.socket) -> None:
        self._forget(end)
        close(end)

    def _forget(self, end: socket.socket) -> None:
        self._selector.unregister(end)
        del self._heard[end], self._until[end]


def introduce(name: str, port: int, token: str, *, within: float) -> Connection:
    """A connection to rank 0. OSError if nobody answers there as rank 0 does. within: seconds for each wait."""
    end = track(socket.create_connection((name, port), timeout=within))
    try:
        end.sendall(token.encode())
        answer = b""
        while data := end.recv(len(WELCOME) - len(answer)):
            answer += data
            if answer == WELCOME:
                end.settimeout(None)
                return Connection(end)
        raise OSError("somebody else's port, or machine")
    except OSError:
        close(end)
        raise


def _received(end: socket.socket, most: int) -> bytes:
    """Up to so many bytes, which are there; none at the end."""
    try:
        return end.recv(most)
    except OSError:
        return b""


def _listen(is_one_machine: bool) -> socket.socket:
    if is_one_machine:
        listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    else:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=4096)
    listener.setblocking(False)  # who is gone again since select() is not waited for
    return listener


def keep_alive(end: socket.socket) -> None:
    """Have the kernel ask a silent machine whether it is there: one that is gone without a word ends the connection."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
    for name, value in zip(names, KEEPALIVE, strict=True):
        if hasattr(socket, name):  # not on every system
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


#: Sockets that a forked child has to be rid of: with its copies the end of its parent would go unnoticed.
_open: set[socket.socket] = set()


def track(end: socket.socket) -> socket.socket:
    _open.add(end)
    return end


def close(end: socket.socket) -> None:
    _open.discard(end)
    end.close()


def _close_all() -> None:
    for end in _open:
        end.close()
    _open.clear()


os.register_at_fork(after_in_child=_close_all)
