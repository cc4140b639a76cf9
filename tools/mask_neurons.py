"""Masks the teacher's most active FFN neurons in teacher and student, and as many random ones, and scores both models.

    python tools/mask_neurons.py --teacher TEACHER --student STUDENT --items questions.jsonl --plot masking.png
    python tools/mask_neurons.py --teacher TEACHER --student RUN --input heldout.jsonl --num-neurons 50 --scope layer

--items are JSON lines {"prompt": TEXT, "choices": [TEXT, ...], "answer": INDEX}: the score is the part of them whose
right choice the model thinks likeliest. On plain text the score is the part of the tokens that the model predicts,
and the LM loss is given too.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrc.config import ConfigError

if TYPE_CHECKING:
    from megatron_lrc.evaluation.masking import MaskingOptions


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
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
    return parser


def parse_options(argv: list[str] | None) -> "MaskingOptions":
    flags = build_parser().parse_args(argv)
    from megatron_lrc.evaluation.masking import MaskingOptions  # here, so that --help answers at once

    return MaskingOptions(**vars(flags))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after a user's error (one sentence on stderr), or 130 after Ctrl-C."""
    options = parse_options(argv)
    try:
        from megatron_lrc.evaluation.masking import mask_neurons

        mask_neurons(options, report=lambda line: print(line, flush=True))
    except (ConfigError, OSError) as error:
        print(f"mask_neurons.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mask_neurons.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
