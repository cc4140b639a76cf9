"""What --kl-divergence names: how far the student's distribution is from the teacher's (`clone/divergences.py`)."""

import math

#: BETA of the two ends of the family, which have formulas of their own.
FORWARD, REVERSE = 0.0, 1.0


def parse_divergence(text: str) -> float:
    """BETA of `forward`, `reverse` or `jsd:BETA`. Raises ValueError, which says what was expected."""
    if text in ("forward", "reverse"):
        return FORWARD if text == "forward" else REVERSE
    name, colon, number = text.partition(":")
    try:
        beta = float(number)
    except ValueError:
        beta = math.nan
    if name != "jsd" or not colon or not 0 < beta < 1:
        raise ValueError("expected is forward, reverse, or jsd:BETA with a BETA between 0 and 1, as in jsd:0.5")
    return beta
