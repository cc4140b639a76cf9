"""Text to megatron-core's indexed format, with Megatron-LM's flags.

    megatron-lrc preprocess --input corpus.jsonl --output-prefix data/corpus --append-eod \\
        --tokenizer-model TEACHER

writes data/corpus_text_document.bin, .idx and .json (a manifest). Training reads it with
--data-path data/corpus_text_document. With --sources a mixture is made of several.
"""

import argparse
import os
from collections.abc import Sequence

from megatron_lrc.commands.flags import flag_adder, new_parser, positive
from megatron_lrc.commands.next_command import after_indexing, say_next
from megatron_lrc.config import ConfigError
from megatron_lrc.console import say
from megatron_lrc.data.chat_template import DEFAULT_DATE
from megatron_lrc.data.filters import parse_filter
from megatron_lrc.data.indexing import index_documents
from megatron_lrc.data.mixtures import index_sources
from megatron_lrc.data.preparation import IndexingOptions
from megatron_lrc.data.tiktoken_files import TiktokenOptions
from megatron_lrc.data.token_counts import parse_token_count
from megatron_lrc.data.writing import explain_os_error

INTERRUPTED = "interrupted; the same command goes on from here"


def read_flags(argv: Sequence[str], program: str) -> tuple[IndexingOptions, str | None]:
    """The options, and the file of --sources."""
    parser = new_parser(program, __doc__)
    add = flag_adder(parser)
    add_inputs = flag_adder(parser.add_mutually_exclusive_group(required=True))
    add_inputs(
        "--input",
        "files, folders or quoted patterns: .jsonl (one object per line), .txt (one document per file), both also "
        "as .gz, .bz2, .xz or .zst; .parquet (one document per row)",
        nargs="+",
        metavar="PATH",
    )
    add_inputs(
        "--sources",
        "a YAML list of sources, each with a name, an input, and if wanted json_keys, filter, sample_fraction and "
        "max_tokens (its budget); writes PREFIX_NAME_KEY_document for each, and prints the --data-path that mixes them",
        metavar="FILE",
    )
    parser.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys or columns to read, one dataset each (default: text); a list of messages there, as in chat data, is "
        "rendered with the tokenizer's chat template",
    )
    outputs = "writes PREFIX_KEY_document.bin, .idx, .json, .mask"
    add("--output-prefix", outputs, required=True, metavar="PREFIX")
    kinds = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer")
    add("--tokenizer-type", "kind of --tokenizer-model", choices=kinds, default=kinds[0])
    models = "tokenizer directory, SentencePiece .model file, or for TikTokenizer a rank file"
    add("--tokenizer-model", models, required=True, metavar="PATH")
    add_tiktoken_flags(parser)
    add("--append-eod", "end every document with the tokenizer's EOS token", action="store_true")
    add(
        "--eos-before-bos-after",
        "join documents as EOS + text + BOS (the released code's way), instead of --append-eod",
        action="store_true",
    )
    add(
        "--token-ids",
        "the keys hold lists of token ids of this tokenizer instead of text, such as the released code's "
        '{"input_ids": [...]}; with --json-keys input_ids',
        action="store_true",
    )
    add("--chat-template-name", "of a tokenizer's several chat templates, the one for chats", metavar="NAME")
    dates = "the date that chat templates take for today's, so that every day gives the same data"
    add("--chat-date", f"{dates} (default: {DEFAULT_DATE})", metavar="YYYY-MM-DD")
    add(
        "--no-assistant-mask",
        "do not write which tokens of chats are the assistant's (PREFIX_KEY_document.mask); a run then trains on all",
        action="store_false",
        dest="assistant_mask",
    )
    add_selection_flags(parser)
    add("--workers", "processes that encode", type=positive, default=1)
    bad = "a line that is not UTF-8, not JSON, lacks a key or cannot be filtered: stop, or leave it out and count it"
    add("--on-bad-line", bad, choices=("fail", "skip"), default="fail")
    add("--log-interval", "documents between progress lines", type=positive, default=10000)
    values = vars(parser.parse_args(argv))
    values["filters"] = tuple(map(parse_filter, values["filters"]))
    if values["max_tokens"] is not None:
        values["max_tokens"] = parse_token_count(values["max_tokens"])
    names = [name for name in values if name.startswith("tiktoken_")]
    tiktoken = TiktokenOptions(**{name.removeprefix("tiktoken_"): values.pop(name) for name in names})
    sources = values.pop("sources")
    values["input"] = values["input"] or []
    options = IndexingOptions(**values, tiktoken=tiktoken)
    if sources and (options.selection.is_partial or options.max_tokens is not None):
        raise ConfigError("--filter, --sample-fraction and --max-tokens differ by source: write them into --sources.")
    return options, sources


def add_selection_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which rows", "A null meets no filter. The manifest says what was left out.")
    add = group.add_argument
    add(
        "--filter",
        dest="filters",
        action="append",
        default=[],
        metavar="CONDITION",
        help="take rows that meet 'COLUMN OP VALUE' only, such as 'int_score >= 4', 'language in [en, de]' "
        "(>= > <= < == != in); may be given several times, and all have to be met",
    )
    shares = "of the rows that meet the filters take about this share, chosen by a hash of what they hold"
    add("--sample-fraction", type=float, default=1.0, metavar="X", help=f"{shares} (default: all)")
    add("--sample-seed", type=int, default=0, metavar="N", help="another seed takes other rows (default: 0)")
    most = "stop after the document by which the dataset has this many tokens, EOS and BOS included: 18B, 450M, 1.5e9"
    add("--max-tokens", metavar="N", help=most)


def add_tiktoken_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "TikTokenizer",
        'The file has a line "BASE64 RANK" per token (special tokens follow the ranks, as in Llama 3), or is '
        "Megatron-LM's JSON vocabulary (special tokens come first).",
    )
    add = group.add_argument
    patterns = "how text is split: v1 or v2 (Megatron-LM's), llama3, or a regex"
    add("--tiktoken-pattern", metavar="PATTERN", help=patterns)
    numbers = "all special tokens; those not named are called <SPECIAL_i> (default: the named ones; 1000 for JSON)"
    add("--tiktoken-num-special-tokens", type=int, metavar="N", help=numbers)
    add(
        "--tiktoken-special-tokens",
        "--tokenizer-special-tokens",
        nargs="+",
        metavar="TOKEN",
        help="names in the order of their ids (default: none; <unk> <s> </s> <mask> <pad> <cls> <sep> for JSON)",
    )
    for role, names in (("bos", "<s> or <|begin_of_text|>"), ("eos", "</s> or <|end_of_text|>")):
        which = f"which of them is {role.upper()} (default: {names})"
        add(f"--tiktoken-{role}-token", metavar="TOKEN", help=which)
    every = "ids in all, special tokens included; the file's later ranks are cut off (default: all)"
    add("--vocab-size", dest="tiktoken_vocab_size", type=positive, metavar="N", help=every)


def run(argv: Sequence[str], program: str) -> int:
    options, sources = read_flags(argv, program)
    # One thread per process, so that --workers says how many cores are used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if sources:
            prefixes = index_sources(sources, options, report=say)
        else:
            index_documents(options, report=say)
            prefixes = [f"{options.output_prefix}_{key}_document" for key in options.json_keys]
    except OSError as error:
        raise ConfigError(explain_os_error(error, options.output_prefix)) from error
    say_next(program, after_indexing(prefixes))
    return 0
