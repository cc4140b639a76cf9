"""Joins indexed datasets of one tokenizer into one.

    python tools/merge_datasets.py --input data/a_text_document data/b_text_document --output-prefix data/all

writes data/all.bin and .idx, and .json (a manifest) if every input has one. Documents keep their order. All work is in
megatron_lrc/data/merging.py.
"""

import argparse
import sys

from megatron_lrc.config import ConfigError
from megatron_lrc.data.merging import MergeOptions, merge_datasets
from megatron_lrc.data.writing import explain_os_error


def parse_options(argv: list[str] | None) -> MergeOptions:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PREFIX", help="datasets in order, PREFIX of PREFIX.bin and .idx"
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .json")
    return MergeOptions(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after a user's error (one sentence on stderr), or 130 after Ctrl-C."""
    options = parse_options(argv)
    try:
        merge_datasets(options, report=lambda line: print(line, flush=True))
    except (ConfigError, OSError) as error:
        message = explain_os_error(error, options.output_prefix) if isinstance(error, OSError) else error
        print(f"merge_datasets.py: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("merge_datasets.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
