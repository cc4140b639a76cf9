"""What a finished model is worth: held-out perplexity, agreement with its teacher, benchmark tasks.

    megatron-lrc evaluate RUN --data-path DATA --teacher TEACHER
    megatron-lrc evaluate HF_DIR --input heldout.jsonl --tasks all --tasks-dir TASKS --output figures.json
    megatron-lrc evaluate --watch RUN --input heldout.jsonl --tasks piqa sciq --tasks-dir TASKS

A run directory's newest good checkpoint is exported to a temporary directory (TMPDIR says where) as by
convert-to-hf, and evaluated as a user of the export would load it. With --watch every checkpoint of a run is,
as it appears, until the run's last: into RUN/evaluations.jsonl, which its report shows.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_lrc.commands.flags import DTYPES, flag_adder, new_parser, positive
from megatron_lrc.commands.next_command import after_evaluation, say_next
from megatron_lrc.console import say
from megatron_lrc.evaluation.nine_tasks import NINE_TASKS

TAKES_LESS = "Use a smaller --batch-size or --seq-length, or --device cpu."
NICENESS = 10  # of a process that watches a run


def read_flags(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    add = flag_adder(parser)
    model = "run directory, one of its checkpoints, or HF directory"
    add("model", model, type=Path, nargs="?", metavar="RUN_OR_HF_DIR")
    add("--watch", "evaluate this run's checkpoints as they appear, instead of one model", type=Path, metavar="RUN")
    add("--watch-seconds", "between two looks at the run", type=positive, default=30)
    add("--output", "write the figures there (default: nowhere)", type=Path, metavar="FILE.json")
    add = flag_adder(parser.add_argument_group("held-out text"))
    add("--data-path", "indexed datasets", nargs="+", default=[], metavar="PREFIX")
    add("--split", "parts of each dataset, as in training", default="969,30,1", metavar="TRAIN,VALID,TEST")
    add(
        "--eval-split",
        "which part; all: the whole dataset, for one that was given as --valid-data-path",
        choices=("valid", "test", "all"),
        default="valid",
    )
    text = "text files instead or as well: .txt, .jsonl, .parquet, packed or not, folders"
    add("--input", text, nargs="+", default=[], metavar="FILE")
    add("--json-key", "where a line has its text", default="text", metavar="KEY")
    add("--seq-length", "tokens per window; take training's", type=int, default=2048)
    add("--max-tokens", "about how many tokens of each dataset, taken evenly; 0: all", type=int, default=0)
    add(
        "--teacher",
        "HF directory to compare with; a run's own teacher is looked for here if it has moved (default: none)",
        type=Path,
        metavar="DIR",
    )
    add = flag_adder(parser.add_argument_group("tasks of lm-evaluation-harness (pip install 'lm_eval[hf]')"))
    names = f"any that the harness has; all: the paper's nine, {', '.join(NINE_TASKS)}"
    add("--tasks", names, nargs="+", default=[], metavar="TASK")
    rows = "what fetch-tasks wrote, or TASK/SPLIT.jsonl files with the rows of the tasks' datasets"
    add("--tasks-dir", f"{rows} (default: from the Hugging Face hub)", type=Path, metavar="DIR")
    add("--num-fewshot", "examples in prompts", type=int, default=0)
    add("--limit", "first N rows of each task, to try (default: all)", type=int)
    add = flag_adder(parser.add_argument_group("computing"))
    add("--batch-size", "sequences at once", type=int, default=4)
    add("--device", "auto (CUDA if there is), cpu, cuda or cuda:N", default="auto")
    arithmetic = "of weights and arithmetic; losses and KL are in float32 anyway"
    add("--dtype", arithmetic, choices=DTYPES, default="float32")
    flags = parser.parse_args(argv)
    if (flags.model is None) == (flags.watch is None):
        parser.error("a model or --watch RUN is expected: give one of them")
    if flags.watch and flags.output:
        parser.error("--output is for one model; --watch writes RUN/evaluations.jsonl: leave --output out")
    return flags


def run(argv: Sequence[str], program: str) -> int:
    flags = vars(read_flags(argv, program))
    watched, seconds = flags.pop("watch"), flags.pop("watch_seconds")
    # Here, so that --help answers at once.
    from megatron_lrc.evaluation.evaluate import EvaluationOptions, evaluate
    from megatron_lrc.evaluation.watching import watch

    options = EvaluationOptions(**(flags | {"model": watched or flags["model"]}))
    if watched:
        os.nice(NICENESS)  # the run goes first
        watch(options, say, seconds=seconds)
    else:
        evaluate(options, report=say)
    say_next(program, after_evaluation(options.model))
    return 0
