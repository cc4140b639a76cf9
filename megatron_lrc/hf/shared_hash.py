"""What a model's files hold, found at the start of a run: remembered, or read by all ranks of a node together.

Each rank hashes every n-th chunk of what the cache does not know and tells the others through the store at
which the ranks of the run have met; no process group is needed, and nobody waits for ever. The ranks of a node
share, and nodes do not, since each may have a copy of its own, and each copy has to be whole.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_lrc.config import ConfigError
from megatron_lrc.hf.content_hash import CHUNK_BYTES, Chunk, FileContents, assemble, hash_chunks, plan
from megatron_lrc.hf.hash_cache import FileState, contents_of, read_cache, write_cache
from megatron_lrc.launch.agreement import RanksMissing

_POLL_SECONDS = 0.02
_SLOWEST_READING = 10**7  # bytes/s of one rank: whoever is slower is taken for gone


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str, /) -> Any: ...

    def check(self, keys: list[str], /) -> bool: ...

    def get(self, key: str, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Sharers:
    """The ranks of this node, as this one sees them. timeout: seconds to wait for another one, beside its reading."""

    store: Store | None
    node: int  # the first rank of the node
    rank: int  # among the node's
    members: tuple[int, ...]  # of the node's ranks, those that share
    timeout: float

    @classmethod
    def of_environment(cls, store: Store | None, timeout: float) -> "Sharers":
        """By torchrun's environment. Without LOCAL_WORLD_SIZE nobody knows who is on this node: each reads all."""
        size, rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        if store is None or size == 1:
            return cls(None, 0, 0, (0,), timeout)
        return cls(store, int(os.environ["RANK"]) - rank, rank, tuple(range(size)), timeout)

    @property
    def is_first(self) -> bool:
        return self.rank == self.members[0]

    def of_same_files(self, states: Iterable[FileState]) -> "Sharers":
        """Those for which these are the same files too: another path, or another container, may show others."""
        if self.store is None:
            return self
        own = [[*state.key, state.device] for state in states]
        self.tell("files", own)
        return replace(self, members=tuple(rank for rank in self.members if self.hear("files", rank) == own))

    def tell(self, what: str, value: Any) -> None:
        """Give the others this value, as JSON."""
        if self.store is not None:
            self.store.set(self._key(what, self.rank), json.dumps({"value": value}))

    def hear(self, what: str, rank: int, *, num_bytes: int = 0) -> Any:
        """What that rank tells. num_bytes: that it has to read first."""
        limit = self.timeout + num_bytes / _SLOWEST_READING
        try:
            message = self._wait(self._key(what, rank), limit)
        except RuntimeError as error:
            raise RanksMissing("The store at which the ranks meet is gone. The log of rank 0 says why.") from error
        if message is None and what == "files":  # the first that each rank of the node tells
            raise RanksMissing(
                f"Rank {self.node + rank} did not come within {limit:.3g} s of rank {self.node + self.rank} "
                "(--distributed-timeout-minutes). Its log says why; where ranks only take long to start, give a longer "
                "time."
            )
        if message is None:
            raise RanksMissing(
                f"Rank {self.node + rank} has not told what its part of the model's files holds within {limit:.0f} s: "
                f"it has ended, or reads less than {_SLOWEST_READING / 10**6:.0f} MB/s. Its own log says which; give "
                "a longer --distributed-timeout-minutes, or copy the files to a faster disk."
            )
        if "error" in message:
            raise ConfigError(f"rank {self.node + rank} ({socket.gethostname()}) cannot start: {message['error']}")
        return message["value"]

    def _wait(self, key: str, limit: float) -> dict[str, Any] | None:
        """What is written there, or None after so many seconds. In short steps, so that signals come through."""
        assert self.store is not None
        deadline = time.monotonic() + limit
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL_SECONDS)
        return json.loads(self.store.get(key))

    def tell_failure(self, text: str) -> None:
        """This rank cannot start: let no other of its node wait for it."""
        if self.store is None:
            return
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it whoever would listen
            for what in ("files", "known", "chunks"):
                self.store.set(self._key(what, self.rank), json.dumps({"error": text}))

    def _key(self, what: str, rank: int) -> str:
        return f"teacher_hash/{self.node}/{what}/{rank}"


def contents_at_start(
    directory: Path, paths: Sequence[Path], sharers: Sharers | None = None
) -> dict[Path, FileContents]:
    """What these files hold; `directory` is theirs, and has the cache. Each of the sharers has to call this.

    ConfigError where a file cannot be read, or another sharer says that it has failed; RanksMissing where one does
    not come. Whoever catches these owes the others `Sharers.tell_failure`.
    """
    states = {path: FileState.of(path) for path in paths}
    sharers = (sharers or Sharers(None, 0, 0, (0,), 0.0)).of_same_files(states.values())
    known = _known(directory, states, sharers)
    sizes = {path: state.size for path, state in states.items() if path not in known}
    found = {**known, **assemble(sizes, _share(sizes, sharers))}
    if sizes and sharers.is_first:
        write_cache(directory, states, found)
    return {path: found[path] for path in paths}


def _known(directory: Path, states: dict[Path, FileState], sharers: Sharers) -> dict[Path, FileContents]:
    """What the cache knows; the first sharer looks, since it may be written while the others would."""
    if sharers.is_first:
        known = read_cache(directory, states)
        files = {path.name: [found.size, [chunk.to_list() for chunk in found.chunks]] for path, found in known.items()}
        sharers.tell("known", files)
        return known
    files = sharers.hear("known", sharers.members[0])
    return {path: contents_of(files[path.name][1], size=files[path.name][0]) for path in states if path.name in files}


def _share(sizes: dict[Path, int], sharers: Sharers) -> list[Chunk]:
    """All chunks of these files, each read by one of the sharers."""
    work, size = plan(sizes), len(sharers.members)
    if size == 1:
        return hash_chunks(work)
    own = work[sharers.members.index(sharers.rank) :: size]
    sharers.tell("chunks", [chunk.to_list() for chunk in hash_chunks(own, sharers=size)])
    chunks: dict[int, Chunk] = {}
    for number, rank in enumerate(sharers.members):
        told = sharers.hear("chunks", rank, num_bytes=len(own) * CHUNK_BYTES)
        chunks |= zip(range(number, len(work), size), map(Chunk.of_list, told), strict=True)
    return [chunks[index] for index in range(len(work))]
