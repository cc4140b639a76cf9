"""Singular values of a clone's projections: in how many directions each P [D, d] uses the teacher's space.

    python -m megatron_lrc.evaluation.projections RUN --output FILE.json

RED (arXiv 2605.29327) blames their spread for what a clone of random projections loses. A comparison measures it of
each clone.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from megatron_lrc.checkpoints.saved_student import open_checkpoint
from megatron_lrc.clone.spectrum import condition_number, effective_rank
from megatron_lrc.whole_files import write_whole


def measure_projections(run: Path) -> dict[str, Any]:
    """Of the newest checkpoint: how many P there are; the mean over them of the effective rank (between 1 and d) and
    the median and the largest ratio of the largest to the smallest singular value (None: infinite). Empty where the
    student has matrices of its own, as with every method but a clone that is not opened."""
    saved = open_checkpoint(str(run))
    if not saved.is_composed:
        return {}
    moments = [matrix.double().t() @ matrix.double() for matrix in saved.projections.values()]
    conditions = [condition_number(moment) for moment in moments]
    return {
        "matrices": len(moments),
        "effective_rank": statistics.fmean(float(effective_rank(moment)) for moment in moments),
        "condition": _finite(statistics.median(conditions)),
        "worst_condition": _finite(max(conditions)),
    }


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="run directory, or one of its checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="file to write, JSON")
    flags = parser.parse_args()
    write_whole(flags.output, json.dumps(measure_projections(flags.run), indent=1) + "\n")


if __name__ == "__main__":
    main()
