"""Rank 0's part of `peers.py`: it hears of every rank's end, judges which one ended the run, and tells all.

Messages (`connections.py`). To rank 0: {rank, host}, {failed, is_waiting}, {at}, {bye}. From it: {ask},
{verdict, ranks}, {bye}. A machine that is gone without a word is noticed by TCP's keepalive.
"""

import selectors
import threading
import time
from dataclasses import dataclass
from typing import Any

from megatron_lrc.launch.connections import Connection, Entrance

ANSWER_WITHIN = 2.0  # seconds that a rank has to say that it is there
NAMED = 8  # ranks in one sentence


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ended the run. ranks: whose doing it was; empty where nobody knows."""

    text: str
    ranks: tuple[int, ...] = ()


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

    def __init__(self, world_size: int, *, is_one_machine: bool):
        super().__init__(name="peers-hub", daemon=True)
        self._selector = selectors.DefaultSelector()
        self._entrance = Entrance(self._selector, self._admit, num_expected=world_size, is_one_machine=is_one_machine)
        self._ranks: dict[Connection, _Rank] = {}
        self._failed: list[_Rank] = []  # in the order in which rank 0 heard of it
        self._deadline: float | None = None
        self._is_over = False

    @property
    def address(self) -> dict[str, Any]:
        """What a rank needs to connect."""
        return self._entrance.address

    def run(self) -> None:
        while not self._is_over and not self._is_time_to_judge():
            for key, _ in self._selector.select(self._wait()):
                key.data()
            self._entrance.turn_away_late()
        self._entrance.close()
        if self._is_over:
            self._tell(bye=True)
        else:
            verdict = self._judge()
            self._tell(verdict=verdict.text, ranks=verdict.ranks)

    def _wait(self) -> float | None:
        """Seconds until something is due that no socket says; None: nothing is."""
        deadlines = [due for due in (self._deadline, self._entrance.deadline) if due is not None]
        return max(min(deadlines) - time.monotonic(), 0) if deadlines else None

    def _admit(self, connection: Connection) -> None:
        self._ranks[connection] = _Rank()
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(connection))

    def _read(self, connection: Connection) -> None:
        rank = self._ranks[connection]
        messages = connection.receive()
        try:
            for message in messages or []:
                self._take(rank, message)
            has_left = any("bye" in message for message in messages or [])
        except Exception:  # whatever is wrong with what it said: this thread is to live
            messages, has_left = None, False
        if messages is None or has_left:
            self._selector.unregister(connection)
            del self._ranks[connection]
            connection.close()
        if messages is None and rank.number >= 0:
            self._note(rank, f"{rank.name} died")

    def _take(self, rank: _Rank, message: dict[str, Any]) -> None:
        if rank.number < 0:
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
