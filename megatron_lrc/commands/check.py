"""`megatron-lrc check FLAGS` takes the flags of `train`, refuses what it would refuse, and starts nothing."""

from collections.abc import Sequence

from megatron_lrc.commands import train


def run(argv: Sequence[str], program: str) -> int:
    return train.run(argv, program, only_checks=True)
