"""Text files to megatron-core's indexed datasets: what tools/preprocess_data.py runs.

One dataset per JSON key, PREFIX_KEY_document.bin/.idx, and beside them a manifest (.json): which tokenizer
and which sources made it; training refuses a dataset whose manifest names another tokenizer. A run that was
stopped goes on where it was, without a byte's difference (`restart.py`). `preparation.py` checks flags and files,
`input_files.py` opens them, `selection.py` says which rows are taken, `encoding.py` turns lines into tokens,
`writing.py` writes under temporary names; here is the whole.
"""

import contextlib
import os
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, replace
from typing import Any

from megatron_lrc import __version__
from megatron_lrc.config import ConfigError
from megatron_lrc.data.assistant_masks import describe_counted
from megatron_lrc.data.encoding import EncodedChunk, encode_chunks, read_chunks, take_tokens
from megatron_lrc.data.preparation import IndexingOptions, Preparation, check_options, check_paths, prepare
from megatron_lrc.data.progress import Progress
from megatron_lrc.data.restart import Done, Journal
from megatron_lrc.data.selection import ROW_COUNTS
from megatron_lrc.data.tokenizers import load_tokenizer
from megatron_lrc.data.writing import DatasetWriter, is_complete, publish


def index_documents(options: IndexingOptions, *, report: Callable[[str], None]) -> None:
    """Writes one indexed dataset and manifest per JSON key; `report` gets the progress lines.

    Goes on from where an earlier process with the same options stopped. What was done is kept after an
    interrupt or an error too, if it was seconds of work.
    """
    check_options(options)
    files = check_paths(options, report)
    tokenizer = load_tokenizer(options.tokenizer_model, options.tokenizer_type, options.tiktoken)
    preparation = prepare(options, files, tokenizer)
    journal = preparation.journal()
    write_datasets(preparation, journal, report=report)
    journal.remove()


def write_datasets(preparation: Preparation, journal: Journal, *, report: Callable[[str], None]) -> None:
    """Reads all files, writes and publishes the datasets. The journal stays, and says so: the caller removes it."""
    options, prefixes = preparation.options, preparation.prefixes
    done = journal.read()
    if done and done.bad_lines and options.on_bad_line == "fail":
        done = None  # an earlier run skipped lines that this one is to stop at
    if done and done.is_complete and all(map(is_complete, prefixes.values())):
        publish_all(prefixes, report)
        return
    done = done if done and not done.is_complete else Done()
    writers: dict[str, DatasetWriter] = {}
    try:
        for key, prefix in prefixes.items():
            writers[key] = DatasetWriter(prefix, preparation.tokenizer.vocab_size, done.counts.get(key))
        if not done.counts:
            journal.remove()  # of other options or sources; not before the writers have seen that nobody is at work
        else:
            report(f"goes on after {next(iter(writers.values())).documents:,} documents that were done before")
        with contextlib.closing(remaining_chunks(preparation, writers, done)) as encoded:
            done = write_chunks(encoded, writers, preparation, done, journal, report)
        for key, writer in writers.items():
            if writer.documents == 0:
                journal.remove()
                raise ConfigError(why_empty(options, key, done))
        for key, writer in writers.items():
            writer.complete(make_manifest(preparation, key, writer, done))
        journal.write(replace(done, is_complete=True), sync=lambda: None)
        publish_all(prefixes, report)
    finally:
        for writer in writers.values():
            if journal.exists():
                writer.close()  # to be gone on with
            else:
                writer.discard()


def remaining_chunks(
    preparation: Preparation, writers: dict[str, DatasetWriter], done: Done
) -> Generator[EncodedChunk, None, None]:
    """What is not done yet, up to the document by which there are --max-tokens. Closing it stops the workers."""
    options, encoder = preparation.options, preparation.encoder
    paths = [file["path"] for file in preparation.files]
    chunks = read_chunks(paths, encoder.keys, done.position, options.filters)
    encoded = encode_chunks(chunks, encoder, workers=options.workers)
    if options.max_tokens is None:
        return encoded
    (key,) = encoder.keys
    return take_tokens(encoded, key, options.max_tokens - writers[key].tokens)


def why_empty(options: IndexingOptions, key: str, done: Done) -> str:
    """A sentence for a dataset without a document."""
    kept, filtered, not_sampled = (done.rows.get(name, 0) for name in ROW_COUNTS.values())
    if kept:
        what = "list of token ids" if options.token_ids else "text"
        why = f"each row (of {kept:,}) has an empty {what} there, or a chat of which the chat template prints nothing"
        remedy = "Name the key that holds documents with --json-keys, or look at the chat template."
    elif filtered or not_sampled:
        why = f"no row is left, since --filter left out {filtered:,} and --sample-fraction {not_sampled:,}"
        remedy = "Loosen them."
    elif done.bad_lines:
        why = "every line is bad"
        remedy = 'Every line should be a JSON object such as {"text": "..."}.'
    else:
        why, remedy = "the files hold no row", "Give files that do."
    if done.bad_lines:
        why += f" (skipped {done.bad_lines:,} bad lines, the first being {done.first_bad_line})"
    return f"{', '.join(options.input)}: no document with text under {key!r}: {why}. {remedy}"


def publish_all(prefixes: dict[str, str], report: Callable[[str], None]) -> None:
    for prefix in prefixes.values():
        publish(prefix)
        report(f"wrote {prefix}.bin, .idx, .json{', .mask' if os.path.exists(f'{prefix}.mask') else ''}")


def write_chunks(
    encoded_chunks: Iterable[EncodedChunk],
    writers: dict[str, DatasetWriter],
    preparation: Preparation,
    done: Done,
    journal: Journal,
    report: Callable[[str], None],
) -> Done:
    """Hands every chunk to the writers, and now and then tells the journal. Gives all that is done then."""
    options = preparation.options
    progress = Progress(
        next(iter(writers.values())),
        done,
        interval=options.log_interval,
        total_bytes=sum(file["bytes"] for file in preparation.files),
        max_tokens=options.max_tokens,
        report=report,
    )

    def sync() -> None:
        for writer in writers.values():
            writer.sync()

    try:
        for encoded in encoded_chunks:
            bad_lines = encoded.name_bad_lines(done.position)
            if bad_lines and options.on_bad_line == "fail":
                raise ConfigError(f"{bad_lines[0]}. Mend the line, or use --on-bad-line skip.")
            for key, writer in writers.items():
                writer.add(encoded.tokens[key], encoded.lengths[key], encoded.masks[key])
            # In one assignment: an interrupt may come anywhere, and position and counts have to belong together.
            done = replace(
                done,
                position=encoded.end(done.position),
                counts={key: writer.counts for key, writer in writers.items()},
                rows=encoded.count_rows(done.rows),
                bad_lines=done.bad_lines + len(bad_lines),
                first_bad_line=done.first_bad_line or next(iter(bad_lines), ""),
                text_bytes=done.text_bytes + encoded.chunk.num_bytes,
                disk_bytes=done.disk_bytes + encoded.chunk.disk_bytes,
            )
            if journal.is_due():
                journal.write(done, sync)
            progress.update(done)
    except BaseException:
        if journal.exists() and done.counts:
            journal.write(done, sync)  # whatever came after `done` is cut off by whoever goes on
        raise
    report(f"done: {progress.line(done)}")
    report_left_out(options, writers, done, report)
    return done


def report_left_out(
    options: IndexingOptions, writers: dict[str, DatasetWriter], done: Done, report: Callable[[str], None]
) -> None:
    if done.bad_lines:
        report(f"skipped {done.bad_lines} bad lines, the first being {done.first_bad_line}")
    for key, writer in writers.items():
        if writer.empty:
            report(f"left out {writer.empty:,} empty document{'s' if writer.empty > 1 else ''} of {key!r}")
        if writer.counted_tokens is not None:
            report(describe_counted(writer.counted_tokens, writer.tokens, f"of {key!r}"))
    if options.selection.is_partial:
        kept, filtered, not_sampled = (done.rows.get(name, 0) for name in ROW_COUNTS.values())
        report(f"kept {kept:,} rows; filters left out {filtered:,}, sampling {not_sampled:,}")


def make_manifest(preparation: Preparation, key: str, writer: DatasetWriter, done: Done) -> dict[str, Any]:
    """What made a dataset. Holds neither times nor the number of workers: the same input gives the same bytes."""
    options, tokenizer = preparation.options, preparation.tokenizer
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
        "bad_lines": done.bad_lines,
        "rows": done.rows,
        "sources": preparation.files,
        "options": {
            "source": options.source,
            "json_key": key,
            "append_eod": options.append_eod,
            "eos_before_bos_after": options.eos_before_bos_after,
            "token_ids": options.token_ids,
            "on_bad_line": options.on_bad_line,
            **options.selection.as_manifest(),
            "max_tokens": options.max_tokens,
            **(tokenizer.chat.identity if tokenizer.chat else {"chat_template": None}),
        },
    }
