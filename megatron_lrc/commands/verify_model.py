"""Whether two models compute the same logits, whichever kind each of them is.

    megatron-lrc verify A B [--dtype float64] [--tolerance 1e-4]

A, B: a Hugging Face directory, one that convert-from-hf wrote, a run directory (its newest checkpoint's
student), or a checkpoint iter_NNNNNNN. Exit code: 0 when they agree, 1 when they differ, 2 after an error.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_lrc.commands.flags import new_parser
from megatron_lrc.config import ConfigError


def read_flags(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    add = parser.add_argument
    kinds = "Hugging Face directory, output of convert_from_hf.py, run directory, or checkpoint (iter_NNNNNNN)."
    add("first", type=Path, metavar="A", help=kinds)
    add("second", type=Path, metavar="B", help=kinds)
    add(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="Data type of the arithmetic. Weights are those of the files in any case.",
    )
    add(
        "--tolerance",
        type=float,
        metavar="X",
        help="Largest difference of logits that counts as none, in standard deviations of the logits. Default: what "
        "rounding may make, 1e-4 in float32, 1e-9 in float64.",
    )
    add("--teacher", metavar="DIR", help="Where a checkpoint's teacher is now. Default: where it was in the training.")
    return parser.parse_args(argv)


def run(argv: Sequence[str], program: str) -> int:
    """Print how far apart the two are. 1 if they differ."""
    flags = read_flags(argv, program)
    import torch  # imported here with the rest, so that --help answers at once

    from megatron_lrc.hf.comparison import TOLERANCES
    from megatron_lrc.verify.open_models import compare_models, open_model, rounding_of

    dtype = getattr(torch, flags.dtype)
    tolerance = TOLERANCES[dtype] if flags.tolerance is None else flags.tolerance
    if not tolerance >= 0:
        raise ConfigError(f"--tolerance {flags.tolerance} is not a size. A number from 0 on is expected, as in 1e-4.")
    models = [open_model(path, flags.teacher) for path in (flags.first, flags.second)]
    for name, model in zip("AB", models, strict=True):
        print(f"{name}: {model}")
    for name, model, other in zip("AB", models, models[::-1], strict=True):
        if rounding_of(model, other) not in (None, model.weights_dtype):
            print(f"The weights of {name} are rounded to those of the other.")
    difference = compare_models(*models, dtype=dtype)
    agrees = difference.is_within(tolerance)
    print(f"logits: {difference}, mean difference {difference.mean:.1e}, in {flags.dtype}")
    print(f"top-1 agreement: {100 * difference.top1_agreement:.1f} %")
    print(f"The models {'agree' if agrees else 'DIFFER'} ({tolerance:g} standard deviations are allowed).")
    return 0 if agrees else 1
