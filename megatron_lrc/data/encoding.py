"""Raw lines to token arrays: the part of data preparation that runs in worker processes.

    files -> chunks of raw lines -> [decode, parse, encode: in worker processes] -> encoded chunks, in order

Workers receive raw bytes and give back token arrays, so the one reader and the one writer in the main process do no
text work. Encoded chunks are taken in the order they were read and only a few are under way at a time: the output is
the same bytes for any number of workers, and memory stays flat however long the input is (multiprocessing's imap would
read all of it ahead).
"""

import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy

from megatron_lrc.config import ConfigError
from megatron_lrc.data.restart import Position
from megatron_lrc.data.sources import Source
from megatron_lrc.data.tokenizers import ChatTemplate, Encode

CHUNK_BYTES = (
    256 * 1024
)  # of raw lines per unit of work: large against the cost of handing it over, small against memory
CHUNKS_AHEAD_PER_WORKER = 4
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half a pair as \ud83d; no UTF-8 can


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive raw lines of one file."""

    source: str
    first_line: int  # counted from 1
    lines: list[bytes]
    disk_bytes: int  # of the file, packed as it may be, that these lines took; about
    end: Position  # where the next chunk begins


@dataclass(kw_only=True)
class EncodedChunk:
    """The documents of one chunk, in order, for each JSON key."""

    tokens: dict[str, numpy.ndarray]  # key -> all documents end to end, int32
    lengths: dict[str, list[int]]  # key -> tokens of each document; 0 where the text gave none
    bad_lines: list[str]  # "FILE:LINE: what is wrong"
    num_bytes: int  # of lines
    disk_bytes: int
    end: Position


@dataclass(frozen=True, kw_only=True)
class ChunkEncoder:
    """Turns chunks into token arrays. Sent once to each worker."""

    keys: list[str]
    encode_batch: Encode
    before: list[int] = field(default_factory=list)  # ids that go round every document
    after: list[int] = field(default_factory=list)
    chat: ChatTemplate | None = None

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        texts: dict[str, list[str]] = {key: [] for key in self.keys}
        bad_lines = []
        for line_number, line in enumerate(chunk.lines, start=chunk.first_line):
            if not line.strip():
                continue
            try:
                for key, text in zip(self.keys, parse_line(line, self.keys, self.chat), strict=True):
                    texts[key].append(text)
            except ConfigError as error:
                bad_lines.append(f"{chunk.source}:{line_number}: {error}")
        tokens, lengths = {}, {}
        for key in self.keys:
            documents = self.encode_batch(texts[key]) if texts[key] else []
            if self.before or self.after:
                documents = [[*self.before, *ids, *self.after] if ids else ids for ids in documents]
            lengths[key] = [len(document) for document in documents]
            tokens[key] = numpy.fromiter(chain.from_iterable(documents), dtype=numpy.int32, count=sum(lengths[key]))
        return EncodedChunk(
            tokens=tokens,
            lengths=lengths,
            bad_lines=bad_lines,
            num_bytes=sum(map(len, chunk.lines)),
            disk_bytes=chunk.disk_bytes,
            end=chunk.end,
        )


def parse_line(line: bytes, keys: list[str], chat: ChatTemplate | None = None) -> list[str]:
    """The texts under `keys` of one JSON line; a list of messages is rendered by `chat`.

    The message of the ConfigError completes "FILE:LINE: ".
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ConfigError(f"a JSON {type(record).__name__}, not an object")
    for key in keys:
        if key not in record:
            raise ConfigError(f"no key {key!r} (the line has {sorted(record)[:8]}; see --json-keys)")
        if isinstance(record[key], list):
            record[key] = render_messages(record[key], key, chat)
        if not isinstance(record[key], str):
            raise ConfigError(f"the value of {key!r} is a {type(record[key]).__name__}, not text")
        if _SURROGATE.search(record[key]):
            raise ConfigError(f"the value of {key!r} has half of a surrogate pair, which is not text")
    return [record[key] for key in keys]


def render_messages(messages: list[Any], key: str, chat: ChatTemplate | None) -> str:
    if not all(isinstance(message, dict) and "role" in message for message in messages):
        raise ConfigError(
            f'the value of {key!r} is a list, but not of messages such as {{"role": ..., "content": ...}}'
        )
    if chat is None:
        raise ConfigError(f"the value of {key!r} is a chat, and the tokenizer has no chat template to render it with")
    return chat(messages)


def read_chunks(paths: list[str], keys: list[str], start: Position | None = None) -> Iterator[Chunk]:
    """All lines of all files from `start` on, in order. A chunk never spans two files. keys: see `sources.Source`."""
    here = start or Position()
    while here.source < len(paths):
        source = Source(paths[here.source], keys, start=here)
        counted = source.position
        lines: list[bytes] = []
        num_bytes = 0
        for line in source:
            lines.append(line)
            num_bytes += len(line)
            if num_bytes >= CHUNK_BYTES:
                end = replace(here, lines=here.lines + len(lines), num_bytes=here.num_bytes + num_bytes)
                yield _chunk(source, here, lines, end, source.position - counted)
                here, lines, num_bytes, counted = end, [], 0, source.position
        next_file = Position(source=here.source + 1)
        if lines:
            yield _chunk(source, here, lines, next_file, source.size - counted)
        here = next_file


def _chunk(source: Source, start: Position, lines: list[bytes], end: Position, disk_bytes: int) -> Chunk:
    return Chunk(source=source.path, first_line=start.lines + 1, lines=lines, disk_bytes=disk_bytes, end=end)


_worker_encoder: ChunkEncoder | None = None  # set once in each worker process


def _start_worker(encoder: ChunkEncoder) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer: it stops the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_encoder = encoder


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    assert _worker_encoder is not None
    return _worker_encoder(chunk)


def encode_chunks(
    chunks: Iterable[Chunk], encoder: ChunkEncoder, *, workers: int
) -> Generator[EncodedChunk, None, None]:
    """Encodes in order. Spawned, not forked: a fork would inherit the locks of the tokenizer's and torch's threads."""
    if workers == 1:
        yield from map(encoder, chunks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encoder,))
    pending: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_in_worker, chunk))
            if len(pending) > CHUNKS_AHEAD_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ConfigError(
            f"One of the {workers} worker processes died, most likely for want of memory. Use fewer --workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
