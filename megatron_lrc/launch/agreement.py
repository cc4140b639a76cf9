"""Ranks tell each other what they are before they do anything together: one that differs is named, and none starts.

Everything goes through the store at which they meet, since a collective of ranks that differ may wait for ever, and
every wait here has an end. Each rank writes one line, {digest, host, remark}; rank 0 reads them and writes its verdict,
for which the others wait. Where all are alike, that is all. Only where digests differ does one rank of each kind send
what it is. The keys:

    rank/R     rank R's line; {failed, host} of one that cannot start
    verdict    {digest} that all have, {speak: [R, ...]} for ranks that are to send their fields, or a refusal
    fields/R   name -> value
    refusal    {refusal, is_missing, listening} after those: what is wrong, in words, and how many ranks read this
    heard      how many have; with the last one all end together, or torchrun would end some before they have spoken
"""

import contextlib
import hashlib
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, Protocol

from megatron_lrc.config import ConfigError
from megatron_lrc.launch.differences import (
    by_value,
    describe_differences,
    describe_failures,
    describe_values,
    name_ranks,
)

#: For a rank that has just been there to send its fields; for ranks that were refused to hear of it.
SPEAK_WITHIN, LEAVE_WITHIN = timedelta(seconds=60), timedelta(seconds=5)
KINDS = 8  # ranks that are asked for their fields: one of each kind


class Store(Protocol):
    """What is used of torch's. RuntimeError: the time is over, or the store is gone."""

    def set(self, key: str, value: str, /) -> Any: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> Any: ...
    def has_extended_api(self) -> bool: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


class RanksMissing(RuntimeError):
    """A rank did not come, or is gone. Nothing that was asked for is wrong: another start may go better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """One rank's place at a comparison of all. name: no other comparison in this store has it. timeout: of rank 0 for
    the others; of these for rank 0 too, and then for its verdict."""

    store: Store
    rank: int
    world_size: int
    timeout: timedelta
    name: str

    def reach(self, fields: Mapping[str, str], remark: str = "") -> str:
        """ConfigError on every rank unless all have the same fields; RanksMissing where one does not come in time.

        fields: name, as the user knows it -> value. remark: what ranks should have in common, but need not: where it
        differs, rank 0 is given how.
        """
        try:
            digest = _digest_of(fields)
            self._write(f"rank/{self.rank}", {"digest": digest, "remark": remark} | _here())
            return self._judge(fields, digest) if self.rank == 0 else self._obey(fields, digest)
        except RanksMissing:
            raise
        except RuntimeError as error:
            raise RanksMissing(
                f"The store at which the ranks meet was gone before rank {self.rank} was told to start: torchrun on "
                "the first node has ended, or rank 0. Its log says why."
            ) from error

    def tell_failure(self, text: str) -> None:
        """This rank cannot start: let no other wait for it."""
        line = {"failed": text} | _here()
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it whoever would listen
            self._write(f"rank/{self.rank}", line)
            if self.rank == 0:
                self._write("verdict", _refusal(describe_failures({0: line})))

    # ------------------------------------------------------------------------------------------------ rank 0

    def _judge(self, fields: Mapping[str, str], digest: str) -> str:
        ranks = range(self.world_size)
        with contextlib.suppress(RuntimeError):
            self._wait([f"rank/{rank}" for rank in ranks], self.timeout)
        came = self._present([f"rank/{rank}" for rank in ranks])
        lines = {rank: line for rank, line in zip(ranks, self._read(came), strict=True) if line}
        failed = {rank: line for rank, line in lines.items() if "failed" in line}
        listening = len(lines) - len(failed)
        if failed:
            self._refuse("verdict", _refusal(describe_failures(failed), listening=listening))
        kinds = by_value(lines, "digest")
        if len(kinds) > 1:  # the number of processes, perhaps, so that some are not even to come
            self._name_differences(list(kinds.values()), fields, lines)
        if missing := [rank for rank in ranks if rank not in lines]:
            self._refuse("verdict", _refusal(self._describe_missing(missing), listening=listening, is_missing=True))
        self._write("verdict", {"digest": digest})
        remarks = by_value(lines, "remark")
        return describe_values(remarks, lines) if len(remarks) > 1 else ""

    def _name_differences(
        self, kinds: list[list[int]], own: Mapping[str, str], lines: Mapping[int, Mapping[str, Any]]
    ) -> NoReturn:
        """Have one rank of each kind say what it is, of the largest and the first few others; and refuse."""
        asked = sorted(kinds, key=lambda ranks: (-len(ranks), ranks[0]))[:KINDS]
        speakers = [ranks[0] for ranks in asked]
        self._write("verdict", {"speak": speakers})
        if 0 in speakers:
            self._write("fields/0", own)
        keys = [f"fields/{rank}" for rank in speakers]
        with contextlib.suppress(RuntimeError):
            self._wait(keys, min(self.timeout, SPEAK_WITHIN))
        said = dict(zip(speakers, self._read(self._present(keys)), strict=True))
        told = [(ranks, fields) for ranks in asked if (fields := said[ranks[0]]) is not None]
        silent = [rank for ranks in kinds if not said.get(ranks[0]) for rank in ranks]
        self._refuse("refusal", _refusal(describe_differences(told, silent, lines), listening=len(lines)))

    def _refuse(self, key: str, refusal: dict[str, Any]) -> NoReturn:
        self._write(key, refusal)
        self._end(refusal)

    def _describe_missing(self, missing: list[int]) -> str:
        here = self.world_size - len(missing)
        return (
            f"{name_ranks(missing).capitalize()} did not come within {_minutes(self.timeout)} of rank 0 "
            f"(--distributed-timeout-minutes); {here} of {self.world_size} ranks are there. Their logs say why; where "
            "ranks only take long to start, give a longer time."
        )

    # ------------------------------------------------------------------------------------------------ the others

    def _obey(self, fields: Mapping[str, str], digest: str) -> str:
        verdict = self._hear("verdict")
        if "speak" in verdict:
            if self.rank in verdict["speak"]:
                self._write(f"fields/{self.rank}", fields)
            verdict = self._hear("refusal")
        if "refusal" in verdict:
            self._end(verdict)
        if verdict["digest"] != digest:
            raise ConfigError(
                f"Rank {self.rank} of {self.world_size} processes is none of those that rank 0 counts. Start every "
                "rank with the same number of processes."
            )
        return ""

    def _hear(self, key: str) -> dict[str, Any]:
        """What rank 0 writes there. Once it has come it may have to wait for others, so it gets as long again."""
        try:
            self._wait([key], self.timeout)
        except RuntimeError:
            if not self._is_there("rank/0"):
                raise RanksMissing(self._describe_missing_judge("did not come")) from None
            try:
                self._wait([key], self.timeout + SPEAK_WITHIN)
            except RuntimeError:
                raise RanksMissing(self._describe_missing_judge("did not answer")) from None
        return json.loads(self.store.get(self._key(key)))

    def _describe_missing_judge(self, did_not: str) -> str:
        return (
            f"Rank 0 {did_not} within {_minutes(self.timeout)} of rank {self.rank} (--distributed-timeout-minutes). "
            "Its log says why; where ranks only take long to start, give a longer time."
        )

    # ------------------------------------------------------------------------------------------------ all

    def _end(self, refusal: Mapping[str, Any]) -> NoReturn:
        """Raise a refusal when all who listen have heard it, or should have."""
        with contextlib.suppress(RuntimeError):
            if self.store.add(self._key("heard"), 1) >= refusal["listening"]:
                self._write("all-heard", {})
            self._wait(["all-heard"], LEAVE_WITHIN)
        raise (RanksMissing if refusal["is_missing"] else ConfigError)(refusal["refusal"])

    def _key(self, key: str) -> str:
        return f"agreement/{self.name}/{key}"

    def _write(self, key: str, values: Mapping[str, Any]) -> None:
        self.store.set(self._key(key), json.dumps(dict(values)))

    def _wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        self.store.wait([self._key(key) for key in keys], timeout)

    def _is_there(self, *keys: str) -> bool:
        return self.store.check([self._key(key) for key in keys])

    def _present(self, keys: Sequence[str]) -> list[str | None]:
        """The keys, with None for those that are not there. One question where all are, else one for each."""
        return list(keys) if self._is_there(*keys) else [key if self._is_there(key) else None for key in keys]

    def _read(self, keys: Sequence[str | None]) -> list[dict[str, Any] | None]:
        """What is there; None for None."""
        wanted = [self._key(key) for key in keys if key]
        at_once = wanted and self.store.has_extended_api()
        values = iter(self.store.multi_get(wanted) if at_once else [self.store.get(key) for key in wanted])
        return [json.loads(next(values)) if key else None for key in keys]


def _here() -> dict[str, str]:
    return {"host": socket.gethostname()}


def _refusal(text: str, *, listening: int = 0, is_missing: bool = False) -> dict[str, Any]:
    return {"refusal": text, "listening": listening, "is_missing": is_missing}


def _digest_of(fields: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(fields), sort_keys=True).encode()).hexdigest()


def _minutes(time: timedelta) -> str:
    minutes = time.total_seconds() / 60
    return f"{minutes:.3g} minute{'s' * (minutes != 1)}"
