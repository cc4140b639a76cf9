"""Raw lines to token arrays: the part of data preparation that runs in worker processes.

    files -> chunks -> [read, decode, parse, encode: in worker processes] -> encoded chunks, in order

A chunk of a plain file says from where to where; the worker reads it, one huge file by all of them together. What is
packed, or a table, is read by the main process, and the worker receives raw lines. Workers give back token arrays, so
that the main process does no text work. Encoded chunks are taken in the order of the lines and only a few are under
way at a time: the output is the same bytes for any number of workers, and memory stays flat however long the input is
(multiprocessing's imap would read all of it ahead).
"""

import codecs
import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy

from megatron_lrc.config import ConfigError
from megatron_lrc.data.assistant_turns import MarkedIds, mark_tokens
from megatron_lrc.data.chat_template import ChatTemplate
from megatron_lrc.data.encoders import Encode
from megatron_lrc.data.file_kinds import kind_of
from megatron_lrc.data.filters import Filter
from megatron_lrc.data.input_files import Source, is_divisible
from megatron_lrc.data.lines import LONGEST_LINE, lines_of, pass_line
from megatron_lrc.data.records import as_marked_chat, as_text, check_ids, parse_record, values_of
from megatron_lrc.data.restart import Position
from megatron_lrc.data.selection import ROW_COUNTS, Outcome, Selection

CHUNK_BYTES = 256 * 1024  # of text per unit of work: large against the cost of handing it over, small against memory
CHUNKS_AHEAD_PER_WORKER = 4

Document = str | list[int] | MarkedIds  # a text, ids, or a chat's ids


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive lines of one file: the lines, or where whoever encodes them finds them in the file."""

    source: str
    num_bytes: int  # of text
    disk_bytes: int  # of the file, packed as it may be, that these lines took; about
    start: int = 0  # byte of the file, where `lines` is None
    lines: list[bytes] | None = None
    is_last: bool = False  # of its file

    def read(self) -> list[bytes]:
        """The lines. ConfigError if the file no longer has them."""
        if self.lines is not None:
            return self.lines
        with open(self.source, "rb") as file:
            file.seek(self.start)
            if self.num_bytes > LONGEST_LINE:
                return list(lines_of(file, self.start + self.num_bytes))
            text = file.read(self.num_bytes)
        if len(text) < self.num_bytes:
            raise ConfigError(f"{self.source} became shorter while it was read. Start again when nothing writes to it.")
        return text.removesuffix(b"\n").split(b"\n")


@dataclass
class EncodedChunk:
    """The documents of one chunk, in order, for each JSON key."""

    chunk: Chunk  # without its lines
    tokens: dict[str, numpy.ndarray]  # key -> all documents end to end, int32
    lengths: dict[str, list[int]]  # key -> tokens of each document; 0 where the text gave none
    masks: dict[str, numpy.ndarray | None]  # key -> of each token whether it counts, bool; None where there is no chat
    bad_lines: list[tuple[int, str]]  # (line of the chunk, from 0; what is wrong with it)
    outcomes: bytes  # an `Outcome` for each line; each that was kept gave a document

    def end(self, start: Position) -> Position:
        """Where the next chunk begins, if this one begins at `start`."""
        if self.chunk.is_last:
            return Position(source=start.source + 1)
        num_bytes = start.num_bytes + self.chunk.num_bytes
        return replace(start, lines=start.lines + len(self.outcomes), num_bytes=num_bytes)

    def name_bad_lines(self, start: Position) -> list[str]:
        """ "FILE:LINE: what is wrong" of each bad line, or "FILE row ROW: ...", if this chunk begins at `start`."""
        place = f"{self.chunk.source}{' row ' if kind_of(self.chunk.source) == '.parquet' else ':'}"
        return [f"{place}{start.lines + line + 1}: {what}" for line, what in self.bad_lines]

    def count_rows(self, before: dict[str, int]) -> dict[str, int]:
        """How many rows became what (`ROW_COUNTS`), those that were counted before included."""
        return {name: before.get(name, 0) + self.outcomes.count(outcome) for outcome, name in ROW_COUNTS.items()}

    def up_to(self, key: str, num_tokens: int) -> "EncodedChunk":
        """The lines up to the document by which `key` has `num_tokens`; all of them if it has fewer."""
        ends = numpy.cumsum(self.lengths[key])
        num_documents = int(numpy.searchsorted(ends, num_tokens)) + 1
        if num_documents > len(ends):  # none of them reaches it
            return self
        kept = numpy.flatnonzero(numpy.frombuffer(self.outcomes, numpy.uint8) == Outcome.KEPT)
        num_lines = int(kept[num_documents - 1]) + 1
        lengths = {name: lengths[:num_documents] for name, lengths in self.lengths.items()}
        num_taken = {name: sum(lengths[name]) for name in lengths}
        return replace(
            self,
            tokens={name: self.tokens[name][:taken] for name, taken in num_taken.items()},
            lengths=lengths,
            masks={name: mask if mask is None else mask[: num_taken[name]] for name, mask in self.masks.items()},
            bad_lines=[(line, what) for line, what in self.bad_lines if line < num_lines],
            outcomes=self.outcomes[:num_lines],
        )


@dataclass(frozen=True, kw_only=True)
class ChunkEncoder:
    """Turns chunks into token arrays. Sent once to each worker."""

    keys: list[str]
    encode_batch: Encode
    vocab_size: int
    before: list[int] = field(default_factory=list)  # ids that go round every document
    after: list[int] = field(default_factory=list)
    chat: ChatTemplate | None = None
    has_token_ids: bool = False  # the keys hold token ids, not text
    marks_chats: bool = True  # whether it is found which of a chat's tokens are the assistant's
    selection: Selection = field(default_factory=Selection)

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        documents: dict[str, list[Document]] = {key: [] for key in self.keys}
        bad_lines = []
        outcomes = bytearray()
        for number, line in enumerate(chunk.read()):
            try:
                outcome, values = self.read(line)
            except ConfigError as error:
                bad_lines.append((number, str(error)))
                outcome, values = Outcome.BAD, []
            outcomes.append(outcome)
            for key, value in zip(self.keys, values, strict=False):  # none but of a line that is kept
                documents[key].append(value)
        tokens, lengths, masks = {}, {}, {}
        for key in self.keys:
            encoded = self._encode(documents[key])
            lengths[key] = [len(ids) for ids in encoded]
            tokens[key] = numpy.fromiter(chain.from_iterable(encoded), dtype=numpy.int32, count=sum(lengths[key]))
            masks[key] = self._join_masks(documents[key], lengths[key])
        return EncodedChunk(replace(chunk, lines=None), tokens, lengths, masks, bad_lines, bytes(outcomes))

    def read(self, line: bytes) -> tuple[Outcome, list[Document]]:
        """What becomes of a line, and its documents, one for each key, if it is kept. ConfigError: it is bad.

        Whatever a line is left out for is found before its texts are looked at.
        """
        line = line.removeprefix(codecs.BOM_UTF8)  # of a file, or of one that was appended to it
        if not line.strip():
            return Outcome.BLANK, []
        record = parse_record(line)
        if not self.selection.passes_filters(record):
            return Outcome.FILTERED, []
        values = values_of(record, self.keys)
        if not self.selection.is_sampled(values):
            return Outcome.NOT_SAMPLED, []
        return Outcome.KEPT, [self._as_document(value, key) for key, value in zip(self.keys, values, strict=True)]

    def _as_document(self, value: Any, key: str) -> Document:
        if self.has_token_ids:
            return check_ids(value, key, self.vocab_size)
        if self.marks_chats and isinstance(value, list):
            return mark_tokens(as_marked_chat(value, key, self.chat), self.encode_batch)
        return as_text(value, key, self.chat)

    def _encode(self, documents: list[Document]) -> list[list[int]]:
        texts = iter(self.encode_batch([document for document in documents if isinstance(document, str)]))
        encoded = [next(texts) if isinstance(document, str) else _ids_of(document) for document in documents]
        if self.before or self.after:
            encoded = [[*self.before, *ids, *self.after] if ids else ids for ids in encoded]
        return encoded

    def _join_masks(self, documents: list[Document], lengths: list[int]) -> numpy.ndarray | None:
        """[tokens of all documents], bool: all of a document that is no chat; of a chat not what goes round it."""
        if not any(isinstance(document, MarkedIds) for document in documents):
            return None
        mask = numpy.ones(sum(lengths), dtype=bool)
        end = 0
        for document, length in zip(documents, lengths, strict=True):
            start, end = end, end + length
            if isinstance(document, MarkedIds) and length:
                mask[start:end] = False
                mask[start + len(self.before) : end - len(self.after)] = document.mask
        return mask


def _ids_of(document: list[int] | MarkedIds) -> list[int]:
    return document.ids if isinstance(document, MarkedIds) else document


def read_chunks(
    paths: list[str], keys: list[str], start: Position | None = None, filters: Sequence[Filter] = ()
) -> Iterator[Chunk]:
    """All lines of all files from `start` on, in order. A chunk never spans two files.

    keys, filters: see `input_files.Source`.
    """
    start = start or Position()
    for path in paths[start.source :]:
        if is_divisible(path):
            yield from _divide(path, start.num_bytes)
        else:
            yield from _unpack(Source(path, keys, skip_lines=start.lines, filters=filters))
        start = Position()


def _divide(path: str, start: int) -> Iterator[Chunk]:
    """A file of plain lines, from byte `start` on, in parts that end with a line. The lines themselves are not read."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        while True:  # at least once: an empty file has a last chunk too
            file.seek(max(min(start + CHUNK_BYTES, size) - 1, start))
            pass_line(file)
            end = file.tell()
            yield Chunk(source=path, start=start, num_bytes=end - start, disk_bytes=end - start, is_last=end >= size)
            if end >= size:
                return
            start = end


def _unpack(source: Source) -> Iterator[Chunk]:
    """A file that only one process can read, in its order."""
    lines: list[bytes] = []
    num_bytes = counted = 0
    for line in source:
        lines.append(line)
        num_bytes += len(line)
        if num_bytes >= CHUNK_BYTES:
            position = source.position
            yield Chunk(source=source.path, lines=lines, num_bytes=num_bytes, disk_bytes=position - counted)
            lines, num_bytes, counted = [], 0, position
    yield Chunk(source=source.path, lines=lines, num_bytes=num_bytes, disk_bytes=source.size - counted, is_last=True)


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


@contextlib.contextmanager
def _keeping_ctrl_c() -> Iterator[None]:
    """What is started meanwhile does not get SIGINT, also while it imports; this thread gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
            with _keeping_ctrl_c():
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


def take_tokens(
    encoded_chunks: Generator[EncodedChunk, None, None], key: str, num_tokens: int
) -> Generator[EncodedChunk, None, None]:
    """The chunks up to the document by which `key` has this many tokens; none for 0. Closes what gives them."""
    with contextlib.closing(encoded_chunks):
        while num_tokens > 0:
            encoded = next(encoded_chunks, None)
            if encoded is None:
                return
            encoded = encoded.up_to(key, num_tokens)
            num_tokens -= len(encoded.tokens[key])
            yield encoded
