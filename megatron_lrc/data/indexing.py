"""Text files to megatron-core's indexed datasets: what tools/preprocess_data.py runs.

One dataset per JSON key, PREFIX_KEY_document.bin/.idx, and beside them a manifest PREFIX_KEY_document.json that says
which tokenizer and which sources made it; training refuses a dataset whose manifest names another tokenizer. Everything
is written under temporary names in the same folder. The .idx takes its final name last: where one stands, all is there.
`encoding.py` turns lines into tokens; here are the files.
"""

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy

from megatron_lrc import __version__
from megatron_lrc.config import ConfigError
from megatron_lrc.data.encoding import ChunkEncoder, EncodedChunk, encode_chunks, read_chunks
from megatron_lrc.data.sources import find_files
from megatron_lrc.data.tokenizers import Tokenizer, TokenizerType, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class IndexingOptions:
    """The flags of tools/preprocess_data.py."""

    input: list[str]
    output_prefix: str
    tokenizer_model: str
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    append_eod: bool = False
    eos_before_bos_after: bool = False
    workers: int = 1
    on_bad_line: Literal["fail", "skip"] = "fail"
    log_interval: int = 10000


class DatasetWriter:
    """One indexed dataset under temporary names, until `commit` gives all three files their final names."""

    def __init__(self, prefix: str, vocab_size: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # megatron-core's remarks on absent GPU libraries do not concern this tool
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
        self.prefix = prefix
        self.documents = self.tokens = self.empty = 0
        self.dtype = DType.optimal_dtype(vocab_size)
        self._temporary = {suffix: f"{prefix}{suffix}.tmp-{os.getpid()}" for suffix in (".bin", ".json", ".idx")}
        self._builder = IndexedDatasetBuilder(self._temporary[".bin"], dtype=self.dtype)

    def add(self, tokens: numpy.ndarray, lengths: list[int]) -> None:
        """Appends documents. Those without a token are counted and left out: megatron-core's datasets need none."""
        start = 0
        for length in lengths:
            if length:
                self._builder.add_document(tokens[start : start + length], [length])  # type: ignore[arg-type]
            start += length
        num_empty = lengths.count(0)
        self.documents += len(lengths) - num_empty
        self.tokens += start
        self.empty += num_empty

    def commit(self, manifest: dict[str, Any]) -> None:
        """Completes the files and renames them; an older .idx goes first, so that it never stands beside newer data."""
        self._builder.finalize(self._temporary[".idx"])
        with open(self._temporary[".json"], "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2)
            file.write("\n")
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{self.prefix}.idx")
        for suffix, temporary in self._temporary.items():
            os.replace(temporary, f"{self.prefix}{suffix}")

    def discard(self) -> None:
        """Removes whatever still has a temporary name."""
        self._builder.data_file.close()
        for temporary in self._temporary.values():
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)


class Progress:
    """A line every `interval` documents: documents, tokens, MB/s of text, share of the files done and time left."""

    def __init__(self, interval: int, total_bytes: int, report: Callable[[str], None]):
        self._interval, self._total_bytes, self._report = interval, total_bytes, report
        self._start = time.monotonic()
        self._bytes = self._disk_bytes = self._next = 0

    def update(self, writer: DatasetWriter, encoded: EncodedChunk) -> None:
        self._bytes += encoded.num_bytes
        self._disk_bytes += encoded.disk_bytes
        if writer.documents >= self._next:
            self._next = writer.documents + self._interval
            self._report(self.line(writer))

    def line(self, writer: DatasetWriter) -> str:
        seconds = max(time.monotonic() - self._start, 1e-6)
        speed = self._bytes / seconds
        share = self._disk_bytes / max(self._total_bytes, 1)
        left = int(seconds * (1 - share) / share) if share else 0
        percent = 100 * share
        return (
            f"{writer.documents:,} documents  {writer.tokens:,} tokens  {speed / 1e6:.2f} MB/s  {percent:.0f}%  "
            f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        )


def index_documents(options: IndexingOptions, *, report: Callable[[str], None]) -> None:
    """Writes one indexed dataset and manifest per JSON key; `report` gets the progress lines."""
    keys = list(dict.fromkeys(options.json_keys))
    prefixes = {key: f"{options.output_prefix}_{key}_document" for key in keys}
    sources = check_paths(options, prefixes)
    tokenizer = load_tokenizer(options.tokenizer_model, options.tokenizer_type)
    before, after = document_ends(options, tokenizer)
    encoder = ChunkEncoder(
        keys=keys, encode_batch=tokenizer.encode_batch, before=before, after=after, chat=tokenizer.chat
    )
    writers: dict[str, DatasetWriter] = {}
    try:
        for key, prefix in prefixes.items():
            writers[key] = DatasetWriter(prefix, tokenizer.vocab_size)
        encoded = encode_chunks(
            read_chunks([source["path"] for source in sources], keys), encoder, workers=options.workers
        )
        with contextlib.closing(encoded):  # stops the workers before the temporary files go
            bad_lines = write_chunks(encoded, writers, options, sum(source["bytes"] for source in sources), report)
        for key, writer in writers.items():
            if writer.documents == 0:
                raise ConfigError(
                    f"{', '.join(options.input)}: no document with text under {key!r} ({len(bad_lines)} bad lines "
                    'skipped). Every line should be a JSON object such as {"text": "..."}.'
                )
        for key, writer in writers.items():
            writer.commit(make_manifest(options, key, writer, tokenizer, sources, len(bad_lines)))
            report(f"wrote {writer.prefix}.bin, .idx, .json")
    finally:
        for writer in writers.values():
            writer.discard()


def document_ends(options: IndexingOptions, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids before and after every document: nothing, Megatron's end of document, or the released code's joining."""
    if options.append_eod and options.eos_before_bos_after:
        raise ConfigError("--append-eod and --eos-before-bos-after are two ways to join documents. Keep one.")
    flag = "--append-eod" if options.append_eod else "--eos-before-bos-after"
    needed = {"EOS": tokenizer.eod} if options.append_eod else {"EOS": tokenizer.eod, "BOS": tokenizer.bos}
    lacking = [name for name, token in needed.items() if token is None]
    if lacking and (options.append_eod or options.eos_before_bos_after):
        raise ConfigError(
            f"{flag}: the tokenizer {options.tokenizer_model!r} has no {' and no '.join(lacking)} token. "
            f"Leave out {flag} or use another tokenizer."
        )
    if options.append_eod:
        return [], [tokenizer.eod]  # type: ignore[list-item]
    if options.eos_before_bos_after:
        return [tokenizer.eod], [tokenizer.bos]  # type: ignore[list-item]
    return [], []


def check_paths(options: IndexingOptions, prefixes: dict[str, str]) -> list[dict[str, Any]]:
    """Paths and sizes of what --input means, none of which an output would overwrite. Makes the output folder."""
    files = find_files(options.input)
    for prefix in prefixes.values():
        for suffix in (".bin", ".idx", ".json"):
            if os.path.realpath(prefix + suffix) in map(os.path.realpath, files):
                raise ConfigError(f"The output {prefix + suffix} is one of the inputs. Use another --output-prefix.")
    folder = os.path.dirname(options.output_prefix)
    try:
        os.makedirs(folder or ".", exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output-prefix {options.output_prefix}: cannot make the folder {folder} ({error.strerror})."
        ) from error
    return [{"path": path, "bytes": os.path.getsize(path)} for path in files]


def write_chunks(
    encoded_chunks: Iterable[EncodedChunk],
    writers: dict[str, DatasetWriter],
    options: IndexingOptions,
    total_bytes: int,
    report: Callable[[str], None],
) -> list[str]:
    """Hands every chunk to the writers. Gives the bad lines that were skipped."""
    first_writer = next(iter(writers.values()))
    progress = Progress(options.log_interval, total_bytes, report)
    bad_lines: list[str] = []
    for encoded in encoded_chunks:
        if encoded.bad_lines and options.on_bad_line == "fail":
            raise ConfigError(f"{encoded.bad_lines[0]}. Mend the line, or use --on-bad-line skip.")
        bad_lines += encoded.bad_lines
        for key, writer in writers.items():
            writer.add(encoded.tokens[key], encoded.lengths[key])
        progress.update(first_writer, encoded)
    report(f"done: {progress.line(first_writer)}")
    if bad_lines:
        report(f"skipped {len(bad_lines)} bad lines, the first being {bad_lines[0]}")
    return bad_lines


def make_manifest(
    options: IndexingOptions,
    key: str,
    writer: DatasetWriter,
    tokenizer: Tokenizer,
    sources: list[dict[str, Any]],
    num_bad_lines: int,
) -> dict[str, Any]:
    """What made a dataset. Holds neither times nor the number of workers: the same input gives the same bytes."""
    return {
        "megatron_lrc_version": __version__,
        "tokenizer": {
            "type": options.tokenizer_type,
            "model": options.tokenizer_model,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        },
        "documents": writer.documents,
        "tokens": writer.tokens,
        "dtype": writer.dtype.__name__,
        "empty_documents": writer.empty,
        "bad_lines": num_bad_lines,
        "sources": sources,
        "options": {
            "json_key": key,
            "append_eod": options.append_eod,
            "eos_before_bos_after": options.eos_before_bos_after,
            "on_bad_line": options.on_bad_line,
            "chat_template": hashlib.sha256(tokenizer.chat.template.encode()).hexdigest() if tokenizer.chat else None,
        },
    }
