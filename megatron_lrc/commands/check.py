"""`megatron-lrc check FLAGS` refuses what `train FLAGS` would refuse, and starts nothing. It takes the same flags."""

from collections.abc import Sequence

from megatron_lrc.commands import train


def run(argv: Sequence[str], program: str) -> int:
    return train.run(argv, program, only_checks=True)
