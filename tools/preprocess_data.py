"""Text to megatron-core's indexed format, with Megatron-LM's flags.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-model TEACHER --append-eod

writes data/corpus_text_document.bin, .idx and .json (a manifest). Training reads it with --data-path
data/corpus_text_document. All work is in megatron_lrc/data/indexing.py.
"""

import argparse
import os
import sys

from megatron_lrc.config import ConfigError
from megatron_lrc.data.indexing import IndexingOptions, index_documents


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def parse_options(argv: list[str] | None) -> IndexingOptions:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders or quoted patterns: .jsonl (one object per line), .txt (one document per file), both also "
        "as .gz or .zst; .parquet (one document per row)",
    )
    parser.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys or columns to read, one dataset each (default: text); a list of messages there, as in chat data, is "
        "rendered with the tokenizer's chat template",
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_KEY_document.bin, .idx, .json"
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=["HuggingFaceTokenizer", "SentencePieceTokenizer"],
        default="HuggingFaceTokenizer",
        help="kind of --tokenizer-model (default: HuggingFaceTokenizer)",
    )
    parser.add_argument(
        "--tokenizer-model", required=True, metavar="PATH", help="tokenizer directory, or SentencePiece .model file"
    )
    parser.add_argument("--append-eod", action="store_true", help="end every document with the tokenizer's EOS token")
    parser.add_argument(
        "--eos-before-bos-after",
        action="store_true",
        help="join documents as EOS + text + BOS (the released code's way), instead of --append-eod",
    )
    parser.add_argument("--workers", type=positive, default=1, help="processes that encode (default: 1)")
    parser.add_argument(
        "--on-bad-line",
        choices=["fail", "skip"],
        default="fail",
        help="a line that is not UTF-8, not JSON or lacks a key: stop, or leave it out and count it (default: fail)",
    )
    parser.add_argument(
        "--log-interval", type=positive, default=10000, help="documents between progress lines (default: 10000)"
    )
    return IndexingOptions(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after a user's error (one sentence on stderr), or 130 after Ctrl-C."""
    options = parse_options(argv)
    # One thread per process, so that --workers says how many cores are used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        index_documents(options, report=lambda line: print(line, flush=True))
    except (ConfigError, OSError) as error:
        print(f"preprocess_data.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("preprocess_data.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
