"""What is in indexed datasets, and whether they are whole.

    python tools/inspect_data.py data/corpus_text_document --verify --samples 3

prints counts, sizes, tokenizer and document lengths of each dataset. A damaged one costs one sentence and exit code 2.
All work is in megatron_lrc/data/inspection.py and indexed_files.py.
"""

import argparse
import sys

from megatron_lrc.config import ConfigError
from megatron_lrc.data.inspection import InspectionOptions, check_drawing, draw_histogram, inspect_dataset


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def parse_options(argv: list[str] | None) -> InspectionOptions:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="PREFIX of PREFIX.bin and PREFIX.idx")
    parser.add_argument(
        "--verify", action="store_true", help="also look at every token id (the index is checked in any case)"
    )
    parser.add_argument("--samples", type=not_negative, default=0, metavar="N", help="print the first N documents")
    parser.add_argument(
        "--sample-seed", type=not_negative, metavar="SEED", help="draw --samples at random instead of the first ones"
    )
    parser.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="tokenizer directory or SentencePiece .model file (default: the one that the manifest names)",
    )
    parser.add_argument("--histogram", metavar="FILE.png", help="draw the document lengths (needs matplotlib)")
    return InspectionOptions(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after a user's error or a damaged dataset (a sentence each on stderr), or 130 after Ctrl-C."""
    options = parse_options(argv)
    inspections, exit_code = [], 0
    try:
        if options.histogram:
            check_drawing()
        for prefix in options.prefixes:
            try:
                inspections.append(inspect_dataset(prefix, options, report=lambda line: print(line, flush=True)))
            except ConfigError as error:
                print(f"inspect_data.py: {error}", file=sys.stderr)
                exit_code = 2
        if options.histogram and inspections:
            draw_histogram(options.histogram, inspections)
            print(f"wrote {options.histogram}")
    except (ConfigError, OSError) as error:
        print(f"inspect_data.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("inspect_data.py: interrupted", file=sys.stderr)
        return 130
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
