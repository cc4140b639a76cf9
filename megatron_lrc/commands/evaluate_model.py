"""What a finished model is worth: held-out perplexity, agreement with its teacher, benchmark tasks.

    megatron-lrc evaluate RUN --data-path DATA --teacher TEACHER
    megatron-lrc evaluate HF_DIR --input heldout.jsonl --tasks all --tasks-dir TASKS --output figures.json

A run directory's newest good checkpoint is exported to a temporary directory (TMPDIR says where) as by
convert-to-hf, and evaluated as a user of the export would load it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_lrc.commands.flags import new_parser, say
from megatron_lrc.evaluation.nine_tasks import NINE_TASKS


def read_flags(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    parser.add_argument(
        "model", type=Path, metavar="RUN_OR_HF_DIR", help="run directory, one of its checkpoints, or HF directory"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures there (default: nowhere)")
    text = parser.add_argument_group("held-out text")
    text.add_argument("--data-path", nargs="+", default=[], metavar="PREFIX", help="indexed datasets (default: none)")
    text.add_argument(
        "--split",
        default="969,30,1",
        metavar="TRAIN,VALID,TEST",
        help="parts of each dataset, as in training (default: 969,30,1)",
    )
    text.add_argument(
        "--eval-split",
        choices=("valid", "test", "all"),
        default="valid",
        help="which part; all: the whole dataset, for one that was given as --valid-data-path (default: valid)",
    )
    text.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text files instead or as well: .txt, .jsonl, .parquet, packed or not, folders (default: none)",
    )
    text.add_argument("--json-key", default="text", metavar="KEY", help="where a line has its text (default: text)")
    text.add_argument(
        "--seq-length", type=int, default=2048, metavar="N", help="tokens per window; take training's (default: 2048)"
    )
    text.add_argument(
        "--max-tokens",
        type=int,
        default=0,
        metavar="N",
        help="about how many tokens of each dataset, taken evenly; 0: all (default: 0)",
    )
    text.add_argument(
        "--teacher",
        type=Path,
        metavar="DIR",
        help="HF directory to compare with; a run's own teacher is looked for here if it has moved (default: none)",
    )
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness (pip install 'lm_eval[hf]')")
    tasks.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        choices=("all", *NINE_TASKS),
        metavar="TASK",
        help=f"all, or of {', '.join(NINE_TASKS)} (default: none)",
    )
    tasks.add_argument(
        "--tasks-dir",
        type=Path,
        metavar="DIR",
        help="TASK/SPLIT.jsonl files with the rows of the tasks' datasets (default: from the Hugging Face hub)",
    )
    tasks.add_argument("--num-fewshot", type=int, default=0, metavar="N", help="examples in prompts (default: 0)")
    tasks.add_argument("--limit", type=int, metavar="N", help="first N rows of each task, to try (default: all)")
    computing = parser.add_argument_group("computing")
    computing.add_argument("--batch-size", type=int, default=4, metavar="N", help="sequences at once (default: 4)")
    computing.add_argument(
        "--device", default="auto", help="auto (CUDA if there is), cpu, cuda or cuda:N (default: auto)"
    )
    computing.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of weights and arithmetic; losses and KL are in float32 anyway (default: float32)",
    )
    return parser.parse_args(argv)


def run(argv: Sequence[str], program: str) -> int:
    flags = read_flags(argv, program)
    # Here, so that --help answers at once.
    from megatron_lrc.evaluation.evaluate import EvaluationOptions, evaluate

    evaluate(EvaluationOptions(**vars(flags)), report=say)
    return 0
