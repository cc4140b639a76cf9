"""Scores teacher and student without the teacher's most active FFN neurons, and without as many random ones.

    megatron-lrc mask-neurons --teacher TEACHER --student STUDENT --items questions.jsonl --plot masking.png
    megatron-lrc mask-neurons --teacher TEACHER --student RUN --input a.txt --num-neurons 50 --scope layer

--items are JSON lines {"prompt": TEXT, "choices": [TEXT, ...], "answer": INDEX}: the score is the part of
them whose right choice the model thinks likeliest. On plain text the score is the part of the tokens that the
model predicts, and the LM loss is given too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_lrc.commands.flags import DTYPES, flag_adder, new_parser
from megatron_lrc.console import say

TAKES_LESS = "Use a smaller --batch-size or --seq-length, or --device cpu."


def read_flags(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    add = flag_adder(parser)
    add("--teacher", "HF directory", type=Path, required=True, metavar="DIR")
    add("--student", "HF directory, run directory or checkpoint", type=Path, required=True, metavar="DIR")
    add("--items", "questions to score (default: --input)", type=Path, metavar="FILE.jsonl")
    add("--input", "text to score instead of questions (default: --items)", nargs="+", default=[], metavar="FILE")
    measured = "text that activations are measured on (default: the items' prompts, or the text of --input)"
    add("--prompts", measured, nargs="+", default=[], metavar="FILE")
    add("--json-key", "where a line has its text", default="text", metavar="KEY")
    add("--num-neurons", "neurons to mask", type=int, default=50)
    scopes = "N neurons of the whole model, as the paper's 50 are read here, or N of each layer"
    add("--scope", scopes, choices=("model", "layer"), default="model")
    add("--num-seeds", "random drawings", type=int, default=5)
    add("--seed", "of the first drawing", type=int, default=0)
    add("--seq-length", "tokens per window", type=int, default=256)
    add("--max-tokens", "about how many tokens of each text, taken evenly; 0: all", type=int, default=0)
    add("--batch-size", "sequences at once", type=int, default=8)
    add("--device", "auto (CUDA if there is), cpu, cuda or cuda:N", default="auto")
    add("--dtype", "of weights and arithmetic", choices=DTYPES, default="float32")
    add("--output", "write the scores there (default: nowhere)", type=Path, metavar="FILE.json")
    add("--plot", "draw the scores (needs matplotlib; default: no plot)", type=Path, metavar="FILE.png")
    return parser.parse_args(argv)


def run(argv: Sequence[str], program: str) -> int:
    flags = read_flags(argv, program)
    # Here, so that --help answers at once.
    from megatron_lrc.evaluation.masking import MaskingOptions, mask_neurons

    mask_neurons(MaskingOptions(**vars(flags)), report=say)
    return 0
