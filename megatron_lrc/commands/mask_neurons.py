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

from megatron_lrc.commands.flags import new_parser, say


def read_flags(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="HF directory")
    parser.add_argument(
        "--student", type=Path, required=True, metavar="DIR", help="HF directory, run directory or checkpoint"
    )
    parser.add_argument("--items", type=Path, metavar="FILE.jsonl", help="questions to score (default: --input)")
    parser.add_argument(
        "--input", nargs="+", default=[], metavar="FILE", help="text to score instead of questions (default: --items)"
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text that activations are measured on (default: the items' prompts, or the text of --input)",
    )
    parser.add_argument("--json-key", default="text", metavar="KEY", help="where a line has its text (default: text)")
    parser.add_argument("--num-neurons", type=int, default=50, metavar="N", help="neurons to mask (default: 50)")
    parser.add_argument(
        "--scope",
        choices=("model", "layer"),
        default="model",
        help="N neurons of the whole model, as the paper's 50 are read here, or N of each layer (default: model)",
    )
    parser.add_argument("--num-seeds", type=int, default=5, metavar="N", help="random drawings (default: 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first drawing (default: 0)")
    parser.add_argument("--seq-length", type=int, default=256, metavar="N", help="tokens per window (default: 256)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=0,
        metavar="N",
        help="about how many tokens of each text, taken evenly; 0: all (default: 0)",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences at once (default: 8)")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is), cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of weights and arithmetic (default: float32)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the scores there (default: nowhere)")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the scores (needs matplotlib; default: no plot)"
    )
    return parser.parse_args(argv)


def run(argv: Sequence[str], program: str) -> int:
    flags = read_flags(argv, program)
    # Here, so that --help answers at once.
    from megatron_lrc.evaluation.masking import MaskingOptions, mask_neurons

    mask_neurons(MaskingOptions(**vars(flags)), report=say)
    return 0
