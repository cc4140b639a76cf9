"""What is in indexed datasets, and whether they are whole.

    megatron-lrc inspect data/corpus_text_document --verify --samples 3

prints counts, sizes, tokenizer and document lengths of each dataset. A damaged one costs one sentence and
exit code 2.
"""

import argparse
from collections.abc import Sequence

from megatron_lrc.commands.flags import new_parser
from megatron_lrc.config import ConfigError
from megatron_lrc.console import complain, say
from megatron_lrc.data.inspection import draw_histogram, inspect_dataset
from megatron_lrc.png_charts import check_matplotlib


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def read_flags(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    add = parser.add_argument
    add("prefixes", nargs="+", metavar="PREFIX", help="PREFIX of PREFIX.bin and PREFIX.idx")
    add("--verify", action="store_true", help="also look at every token id (the index is checked in any case)")
    add("--samples", type=not_negative, default=0, metavar="N", help="print the first N documents")
    add("--sample-seed", type=not_negative, metavar="SEED", help="draw --samples at random instead of the first ones")
    tokenizer = "tokenizer directory or SentencePiece .model file (default: the one that the manifest names)"
    add("--tokenizer-model", metavar="PATH", help=tokenizer)
    add("--histogram", metavar="FILE.png", help="draw the document lengths (needs matplotlib)")
    return parser.parse_args(argv)


def run(argv: Sequence[str], program: str) -> int:
    """2 where a dataset is damaged; the others are inspected all the same."""
    flags = vars(read_flags(argv, program))
    prefixes, histogram = flags.pop("prefixes"), flags.pop("histogram")
    lengths_of, exit_code = {}, 0
    if histogram:
        check_matplotlib("--histogram", "the lengths are printed as text in any case")
    for prefix in prefixes:
        try:
            lengths_of[prefix] = inspect_dataset(prefix, **flags, report=say)
        except ConfigError as error:
            complain(f"{program}: {error}")
            exit_code = 2
    if histogram and lengths_of:
        draw_histogram(histogram, lengths_of)
        print(f"wrote {histogram}")
    return exit_code
