"""Stage 5: a run that saves in the background while it goes on, and one that continues from what was saved.

Both take the same last steps, so that losses, gradient norms and what is trained have to be the same to the last bit.
"""

from functools import partial
from typing import Any

import torch

from benchmarks.gpu_check.checks import Bound, Check, Checks, Figures
from benchmarks.gpu_check.possible import need_support
from benchmarks.gpu_check.settings import Settings
from benchmarks.gpu_check.short_runs import parse, run_flags, train
from benchmarks.gpu_check.small_teacher import write_counting
from megatron_lrc.checkpoints.run_directory import checkpoint_path

SAVED, STEPS = 2, 5
DELAYED = ["--fp8-format", "hybrid", "--fp8-recipe", "delayed"]
#: What differs between two runs that compute the same.
MEASURED = ("time", "step_seconds", "tokens_per_second", "tflops", "mfu", "memory_gib")


def checks(settings: Settings) -> Checks:
    data = write_counting(settings)
    yield Check("bf16", partial(resume, settings, data, "bf16", []))
    yield Check("FP8 delayed", partial(resume, settings, data, "delayed", DELAYED))


def resume(settings: Settings, data: str, name: str, precision: list[str]) -> Figures:
    """How many figures of the records, and how many tensors, are not the same."""
    whole, part = settings.folder / f"{name}-whole", settings.folder / f"{name}-part"
    flags = [*run_flags(settings, data, STEPS), "--bf16", "--deterministic-mode", *precision]
    need_support(settings, parse(flags))
    expected, trained = train(parse([*flags, "--save", str(whole), "--save-interval", str(SAVED), "--async-save"]))
    checkpoint = checkpoint_path(str(whole), SAVED)
    found, again = train(parse([*flags, "--save", str(part), "--load", str(checkpoint)]))
    pairs = list(zip(found, expected[SAVED:], strict=True))
    return {
        "steps": len(pairs),
        "other figures": Bound(sum(_count_others(one, other) for one, other in pairs), 0),
        "tensors": len(trained),
        "other tensors": Bound(sum(not torch.equal(again[key], value) for key, value in trained.items()), 0),
        "loss": expected[-1]["loss"],
    }


def _count_others(found: dict[str, Any], expected: dict[str, Any]) -> int:
    return sum(
        found.get(key) != expected.get(key) for key in found.keys() | expected.keys() if not key.startswith(MEASURED)
    )
