"""Text files to megatron-core's indexed datasets: what tools/preprocess_data.py runs.

One dataset per JSON key, PREFIX_KEY_document.bin/.idx, and beside them a manifest (.json): which tokenizer
and which sources made it; training refuses a dataset whose manifest names another tokenizer. A run that was
stopped goes on where it was, without a byte's difference (`restart.py`). `input_files.py` opens files,
`encoding.py` turns lines into tokens, `writing.py` writes under temporary names; here is the whole.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from megatron_lrc import __version__
from megatron_lrc.config import ConfigError
from megatron_lrc.data.byte_pair import fastest
from megatron_lrc.data.encoding import ChunkEncoder, EncodedChunk, encode_chunks, read_chunks
from megatron_lrc.data.input_files import find_files, kind_of
from megatron_lrc.data.loaded_tokenizer import Tokenizer
from megatron_lrc.data.restart import Done, Journal
from megatron_lrc.data.tables import check_table
from megatron_lrc.data.tiktoken_files import TiktokenOptions
from megatron_lrc.data.tokenizers import TokenizerType, load_tokenizer
from megatron_lrc.data.writing import DatasetWriter, make_folder_of, publish


@dataclass(frozen=True, kw_only=True)
class IndexingOptions:
    """The flags of tools/preprocess_data.py."""

    input: list[str]
    output_prefix: str
    tokenizer_model: str
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    tiktoken: TiktokenOptions = field(default_factory=TiktokenOptions)
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    append_eod: bool = False
    eos_before_bos_after: bool = False
    token_ids: bool = False
    chat_template_name: str | None = None
    chat_date: str | None = None
    workers: int = 1
    on_bad_line: Literal["fail", "skip"] = "fail"
    log_interval: int = 10000


class Progress:
    """A line every `interval` documents: documents, tokens, MB/s of text, share of the files done and time left."""

    def __init__(self, interval: int, total_bytes: int, done: Done, report: Callable[[str], None]):
        self._interval, self._total_bytes, self._report = interval, total_bytes, report
        self._start = time.monotonic()
        self._text_before, self._disk_before = done.text_bytes, done.disk_bytes
        self._next = 0

    def update(self, writer: DatasetWriter, done: Done) -> None:
        if writer.documents >= self._next:
            self._next = writer.documents + self._interval
            self._report(self.line(writer, done))

    def line(self, writer: DatasetWriter, done: Done) -> str:
        seconds = max(time.monotonic() - self._start, 1e-6)
        speed = (done.text_bytes - self._text_before) / seconds
        disk_speed = (done.disk_bytes - self._disk_before) / seconds
        left = int((self._total_bytes - done.disk_bytes) / disk_speed) if disk_speed else 0
        percent = 100 * done.disk_bytes / max(self._total_bytes, 1)
        return (
            f"{writer.documents:,} documents  {writer.tokens:,} tokens  {speed / 1e6:.2f} MB/s  "
            f"{percent:.0f}%  ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        )


def index_documents(options: IndexingOptions, *, report: Callable[[str], None]) -> None:
    """Writes one indexed dataset and manifest per JSON key; `report` gets the progress lines.

    Goes on from where an earlier process with the same options stopped. What was done is kept after an
    interrupt or an error too, if it was seconds of work.
    """
    keys = list(dict.fromkeys(options.json_keys))
    prefixes = {key: f"{options.output_prefix}_{key}_document" for key in keys}
    sources = check_paths(options, prefixes, report)
    tokenizer = load_tokenizer(options.tokenizer_model, options.tokenizer_type, options.tiktoken)
    tokenizer = with_chat_flags(tokenizer, options)
    before, after = document_ends(options, tokenizer)
    encoder = ChunkEncoder(
        keys=keys,
        encode_batch=fastest(tokenizer.encode_batch),
        vocab_size=tokenizer.vocab_size,
        before=before,
        after=after,
        chat=tokenizer.chat,
        has_token_ids=options.token_ids,
    )
    journal = Journal(f"{options.output_prefix}.unfinished.json", identity_of(options, sources, tokenizer))
    done = journal.read()
    if done and done.bad_lines and options.on_bad_line == "fail":
        done = None  # an earlier run skipped lines that this one is to stop at
    if done and done.is_complete:
        publish_all(prefixes, journal, report)
        return
    done = done or Done()
    writers: dict[str, DatasetWriter] = {}
    try:
        for key, prefix in prefixes.items():
            writers[key] = DatasetWriter(prefix, tokenizer.vocab_size, done.counts.get(key))
        if not done.counts:
            journal.remove()  # of other options or sources; not before the writers have seen that nobody is at work
        else:
            report(f"goes on after {next(iter(writers.values())).documents:,} documents that were done before")
        paths = [source["path"] for source in sources]
        encoded = encode_chunks(read_chunks(paths, keys, done.position), encoder, workers=options.workers)
        with contextlib.closing(encoded):  # stops the workers before the files are closed
            total_bytes = sum(source["bytes"] for source in sources)
            done = write_chunks(encoded, writers, options, done, journal, total_bytes, report)
        for key, writer in writers.items():
            if writer.documents == 0:
                journal.remove()
                raise ConfigError(
                    f"{', '.join(options.input)}: no document with text under {key!r} ({done.bad_lines} bad lines "
                    'skipped). Every line should be a JSON object such as {"text": "..."}.'
                )
        for key, writer in writers.items():
            writer.complete(make_manifest(options, key, writer, tokenizer, sources, done.bad_lines))
        journal.write(replace(done, is_complete=True), sync=lambda: None)
        publish_all(prefixes, journal, report)
    finally:
        for writer in writers.values():
            if journal.exists():
                writer.close()  # to be gone on with
            else:
                writer.discard()


def publish_all(prefixes: dict[str, str], journal: Journal, report: Callable[[str], None]) -> None:
    for prefix in prefixes.values():
        publish(prefix)
        report(f"wrote {prefix}.bin, .idx, .json")
    journal.remove()


def identity_of(options: IndexingOptions, sources: list[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Whatever decides the bytes of the output; a source that was touched since counts as another one."""
    chat = tokenizer.chat
    return {
        "megatron_lrc_version": __version__,
        "sources": [{**source, "modified": os.stat(source["path"]).st_mtime_ns} for source in sources],
        "keys": options.json_keys,
        "joining": [options.append_eod, options.eos_before_bos_after],
        "token_ids": options.token_ids,
        "tokenizer": [tokenizer.fingerprint, chat and [chat.template, chat.date]],
    }


def with_chat_flags(tokenizer: Tokenizer, options: IndexingOptions) -> Tokenizer:
    """With the chat template that is chosen, as of the date that is. ConfigError where there is no template."""
    if tokenizer.chat is not None:
        chosen = tokenizer.chat.with_options(name=options.chat_template_name, date=options.chat_date)
        return replace(tokenizer, chat=chosen)
    if options.chat_template_name is not None or options.chat_date is not None:
        raise ConfigError(
            f"--chat-template-name and --chat-date are for tokenizers with a chat template, and "
            f"{options.tokenizer_model!r} has none. Leave them out."
        )
    return tokenizer


def document_ends(options: IndexingOptions, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids before and after every document: nothing, Megatron's end of document, or the released code's joining."""
    if options.append_eod and options.eos_before_bos_after:
        raise ConfigError("--append-eod and --eos-before-bos-after are two ways to join documents. Keep one.")
    if not options.append_eod and not options.eos_before_bos_after:
        return [], []
    flag = "--append-eod" if options.append_eod else "--eos-before-bos-after"
    needed = {"EOS": tokenizer.eod} if options.append_eod else {"EOS": tokenizer.eod, "BOS": tokenizer.bos}
    lacking = [name for name, token in needed.items() if token is None]
    if lacking:
        raise ConfigError(
            f"{flag}: the tokenizer {options.tokenizer_model!r} has no {' and no '.join(lacking)} token. "
            f"Leave out {flag} or use another tokenizer."
        )
    if options.append_eod:
        return [], [tokenizer.eod]  # type: ignore[list-item]
    return [tokenizer.eod], [tokenizer.bos]  # type: ignore[list-item]


def check_paths(
    options: IndexingOptions, prefixes: dict[str, str], report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Paths and sizes of what --input means, none of which an output would overwrite. Makes the output folder.

    prefixes: by key. Tables are checked here already: one that were mended later would begin everything anew.
    """
    files = find_files(options.input, report)
    for prefix in prefixes.values():
        for suffix in (".bin", ".idx", ".json"):
            if os.path.realpath(prefix + suffix) in map(os.path.realpath, files):
                raise ConfigError(f"The output {prefix + suffix} is one of the inputs. Use another --output-prefix.")
    for path in files:
        if kind_of(path) == ".parquet":
            check_table(path, list(prefixes))
    make_folder_of(options.output_prefix)
    return [{"path": path, "bytes": os.path.getsize(path)} for path in files]


def write_chunks(
    encoded_chunks: Iterable[EncodedChunk],
    writers: dict[str, DatasetWriter],
    options: IndexingOptions,
    done: Done,
    journal: Journal,
    total_bytes: int,
    report: Callable[[str], None],
) -> Done:
    """Hands every chunk to the writers, and now and then tells the journal. Gives all that is done then."""
    first_writer = next(iter(writers.values()))
    progress = Progress(options.log_interval, total_bytes, done, report)

    def sync() -> None:
        for writer in writers.values():
            writer.sync()

    try:
        for encoded in encoded_chunks:
            bad_lines = encoded.name_bad_lines(done.position)
            if bad_lines and options.on_bad_line == "fail":
                raise ConfigError(f"{bad_lines[0]}. Mend the line, or use --on-bad-line skip.")
            for key, writer in writers.items():
                writer.add(encoded.tokens[key], encoded.lengths[key])
            # In one assignment: an interrupt may come anywhere, and position and counts have to belong together.
            done = replace(
                done,
                position=encoded.end(done.position),
                counts={key: writer.counts for key, writer in writers.items()},
                bad_lines=done.bad_lines + len(bad_lines),
                first_bad_line=done.first_bad_line or next(iter(bad_lines), ""),
                text_bytes=done.text_bytes + encoded.chunk.num_bytes,
                disk_bytes=done.disk_bytes + encoded.chunk.disk_bytes,
            )
            if journal.is_due():
                journal.write(done, sync)
            progress.update(first_writer, done)
    except BaseException:
        if journal.exists() and done.counts:
            journal.write(done, sync)  # whatever came after `done` is cut off by whoever goes on
        raise
    report(f"done: {progress.line(first_writer, done)}")
    if done.bad_lines:
        report(f"skipped {done.bad_lines} bad lines, the first being {done.first_bad_line}")
    return done


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
            **tokenizer.as_manifest(),
            **({"tiktoken": asdict(options.tiktoken)} if options.tokenizer_type == "TikTokenizer" else {}),
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
            "token_ids": options.token_ids,
            "on_bad_line": options.on_bad_line,
            **(tokenizer.chat.identity if tokenizer.chat else {"chat_template": None}),
        },
    }
