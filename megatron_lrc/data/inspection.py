"""What is in an indexed dataset: what tools/inspect_data.py prints, document lengths drawn, samples decoded."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy

from megatron_lrc.config import ConfigError
from megatron_lrc.data.assistant_masks import AssistantMask
from megatron_lrc.data.directory_tokenizer import open_tokenizer
from megatron_lrc.data.indexed_files import Index, check_token_ids, read_index
from megatron_lrc.data.loaded_tokenizer import Tokenizer, describe_unlike
from megatron_lrc.data.tiktoken_files import TiktokenEncode, TiktokenOptions
from megatron_lrc.data.tokenizers import TokenizerType, load_tokenizer
from megatron_lrc.png_charts import png_chart

_SAMPLE_TOKENS = 200  # shown of each sample
_BAR = 50  # characters of the longest bar


def inspect_dataset(
    prefix: str,
    *,
    verify: bool,
    samples: int,
    sample_seed: int | None,
    tokenizer_model: str | None,
    report: Callable[[str], None],
) -> numpy.ndarray:
    """Reports on one dataset line by line; gives the tokens of each document [documents].

    ConfigError if it is damaged; its index is checked in any case.
    """
    index = read_index(prefix)
    report(prefix)
    lengths = document_lengths(index)
    for line in [*describe(index), *describe_lengths(lengths), *text_histogram(lengths)]:
        report(f"  {line}")
    tokenizer = _tokenizer(index, tokenizer_model, needs_one=samples > 0)
    if verify:
        if index.mask:
            index.mask.check()
        manifest_size = index.manifest["tokenizer"]["vocab_size"] if index.manifest else None
        vocab_size = tokenizer.vocab_size if tokenizer else manifest_size
        largest = check_token_ids(index, vocab_size)
        below = "vocabulary not known" if vocab_size is None else f"below the tokenizer's {vocab_size:,}"
        what = f"header, sizes, lengths, pointers, documents{', checksum of the mask' if index.mask else ''}"
        report(f"  verified     {what}; largest token id {largest:,} ({below})")
    if samples and tokenizer:
        decode = load_decoder(tokenizer)
        for number in sample_numbers(index.num_documents, samples, sample_seed):
            report(f"  {decoded_sample(index, number, tokenizer.vocab_size, decode)}")
            if index.mask:
                report(f"    that count: {counted_parts(index, index.mask, number, decode)}")
    return lengths


def document_lengths(index: Index) -> numpy.ndarray:
    """[documents]: tokens of each document, all its sequences together."""
    if index.num_documents == len(index.lengths):
        return index.lengths
    return numpy.add.reduceat(index.lengths, index.bounds[:-1], dtype=numpy.int64)


def describe(index: Index) -> list[str]:
    """Counts, sizes and the tokenizer, a line each."""
    sizes = {suffix: os.path.getsize(f"{index.prefix}{suffix}") for suffix in (".bin", ".idx")}
    if index.manifest:
        made_with = index.manifest["tokenizer"]
        tokenizer = f"{made_with.get('model')}, {made_with['vocab_size']:,} ids, fingerprint {made_with['fingerprint']}"
    else:
        tokenizer = f"not known: there is no {index.prefix}.json"
    return [
        f"documents    {index.num_documents:,}",
        f"sequences    {len(index.lengths):,}",
        f"tokens       {index.num_tokens:,} ({index.dtype.name})",
        *(f"{suffix}         {size:,} bytes" for suffix, size in sizes.items()),
        f"tokenizer    {tokenizer}",
        *describe_selection(index.manifest or {}),
        *describe_mask(index.mask),
    ]


def describe_mask(mask: AssistantMask | None) -> list[str]:
    """A line where the losses do not count every token."""
    if mask is None:
        return []
    share = mask.num_counted / mask.num_tokens
    return [f"in losses    {mask.num_counted:,} tokens ({share:.1%}): of chats the assistant's"]


def describe_selection(manifest: Mapping[str, Any]) -> list[str]:
    """Which rows of its sources the dataset is made of, where the manifest says that they are not all."""
    options, rows = manifest.get("options") or {}, manifest.get("rows") or {}
    lines = []
    if rows.get("filtered") or rows.get("not_sampled"):
        filters = ", ".join(map(str, options.get("filters") or ["filters"]))
        kept, filtered, not_sampled = (rows.get(name, 0) for name in ("kept", "filtered", "not_sampled"))
        left_out = f"{filtered:,} left out by {filters}, {not_sampled:,} by sampling"
        lines.append(f"rows         {kept:,} kept, {left_out}")
    if options.get("max_tokens"):
        lines.append(f"capped       at the document by which there were {options['max_tokens']:,} tokens")
    return lines


def describe_lengths(lengths: numpy.ndarray) -> list[str]:
    """Extremes, percentiles (lengths that occur, not interpolated) and mean of the tokens per document."""
    values = numpy.percentile(lengths, [0, 10, 50, 90, 99, 100], method="inverted_cdf")
    names = ("min", "10%", "median", "90%", "99%", "max")
    parts = [f"{name} {int(value):,}" for name, value in zip(names, values, strict=True)]
    return [f"per document {', '.join([*parts, f'mean {lengths.mean(dtype=numpy.float64):,.1f}'])}"]


def text_histogram(lengths: numpy.ndarray) -> list[str]:
    """A line per power of two of tokens per document, from the least that occurs to the greatest."""
    counts = numpy.bincount(numpy.frexp(lengths)[1])  # frexp's exponent is the number of binary digits, 0 for 0
    first, most = int(numpy.flatnonzero(counts)[0]), int(counts.max())
    rows = [f"{'tokens':>23}  {'documents':>13}"]
    for digits, count in enumerate(counts.tolist()[first:], start=first):
        low, high = (1 << digits) >> 1, (1 << digits) - 1
        bar = "#" * -(-_BAR * count // most)
        rows.append(f"{f'{low:,} - {high:,}':>23}  {count:>13,}  {bar}".rstrip())
    return rows


def sample_numbers(num_documents: int, num_samples: int, seed: int | None) -> list[int]:
    """The first documents, or with a seed that many different ones drawn at random, in ascending order."""
    num_samples = min(num_samples, num_documents)
    if seed is None:
        return list(range(num_samples))
    return sorted(numpy.random.default_rng(seed).choice(num_documents, num_samples, replace=False).tolist())


def decoded_sample(index: Index, number: int, vocab_size: int, decode: Callable[[list[int]], str]) -> str:
    """One line: a document's first tokens as a JSON string, so that no control character reaches the terminal."""
    tokens = index.document(number)
    ids = tokens[:_SAMPLE_TOKENS].tolist()
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise ConfigError(
                f"Document {number} of {index.prefix} holds token id {token_id}, but the tokenizer's ids are "
                f"0 to {vocab_size - 1}. Give --tokenizer-model the tokenizer that made the dataset."
            )
    more = " ..." if len(tokens) > len(ids) else ""
    return f"document {number} ({len(tokens):,} tokens): {json.dumps(decode(ids), ensure_ascii=False)}{more}"


def counted_parts(index: Index, mask: AssistantMask, number: int, decode: Callable[[list[int]], str]) -> str:
    """Of the tokens that `decoded_sample` shows those that count, as a JSON list of their runs."""
    tokens = index.document(number)[:_SAMPLE_TOKENS]
    bits = mask.bits(int(index.pointers[index.bounds[number]]) // index.dtype.itemsize, len(tokens))
    edges = numpy.flatnonzero(numpy.diff(numpy.concatenate([[False], bits, [False]]).astype(numpy.int8)))
    runs = [decode(tokens[start:end].tolist()) for start, end in edges.reshape(-1, 2)]
    return json.dumps(runs, ensure_ascii=False)


def load_decoder(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    """Token ids to text, special tokens shown."""
    if isinstance(tokenizer.encode_batch, TiktokenEncode):
        return tokenizer.encode_batch.encoding.decode
    if os.path.isfile(tokenizer.path):
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=tokenizer.path).decode
    hugging_face = open_tokenizer(tokenizer.path)
    return lambda ids: hugging_face.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def draw_histogram(path: str, lengths_of: Mapping[str, numpy.ndarray]) -> None:
    """Writes a PNG: share of documents by tokens per document, log-spaced bins, a line per dataset prefix."""
    greatest = max(int(lengths.max()) for lengths in lengths_of.values())
    edges = numpy.unique(numpy.ceil(numpy.geomspace(1, max(greatest + 1, 2), 41)))  # lengths are whole: so are bins
    with png_chart(path, inches=(8, 4.5)) as axes:
        for prefix, lengths in lengths_of.items():
            counts, _ = numpy.histogram(lengths, edges)
            axes.stairs(counts / len(lengths), edges, label=os.path.basename(prefix))
        axes.set(xscale="log", xlabel="tokens per document", ylabel="share of documents")
        axes.legend()


def _tokenizer(index: Index, path: str | None, *, needs_one: bool) -> Tokenizer | None:
    """The one of --tokenizer-model, which must be the manifest's; for samples without the flag, the manifest's own."""
    made_with = index.manifest["tokenizer"] if index.manifest else None
    kind = tiktoken = None
    if path is None and needs_one:
        if made_with is None or not made_with.get("model"):
            raise ConfigError(
                f"--samples needs a tokenizer, and no {index.prefix}.json names one. Give --tokenizer-model PATH."
            )
        path, kind = made_with["model"], made_with.get("type")
        tiktoken = TiktokenOptions(**made_with["tiktoken"]) if kind == "TikTokenizer" else None
    if path is None:
        return None
    tokenizer = load_tokenizer(path, _known_type(kind), tiktoken)
    if made_with and not tokenizer.made(made_with):
        raise ConfigError(
            f"{index.prefix} was made with the tokenizer {describe_unlike(made_with)}, but {path} now has fingerprint "
            f"{tokenizer.fingerprint[:12]}. "
            "Give --tokenizer-model the tokenizer that made the dataset."
        )
    return tokenizer


def _known_type(kind: str | None) -> TokenizerType | None:
    return kind if kind in ("SentencePieceTokenizer", "TikTokenizer") else None  # type: ignore[return-value]
