"""From values to places on paper: linear and logarithmic axes with round ticks, and numbers as text."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_lrc.train.progress import count


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps [low, high] to [0, 1]; logarithmic if `is_log`, where low is above 0."""

    low: float
    high: float
    is_log: bool = False

    @staticmethod
    def around(values: Iterable[float], *, is_log: bool = False, from_zero: bool = False) -> "Axis":
        """Room for all finite values, with a margin; a logarithmic one falls back to linear if none is above 0."""
        finite = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)]
        if not finite:
            return Axis(0.0, 1.0)
        low, high = min(finite), max(finite)
        if is_log:
            low, high = max(math.log10(low), -300.0), math.log10(high)  # and the margin still is above 0
        if from_zero and not is_log:
            low = min(low, 0.0)
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
        low, high = (low if from_zero and low == 0 else low - margin), high + margin
        return Axis(10**low, 10**high, True) if is_log else Axis(low, high)

    def place(self, value: float) -> float | None:
        """0 at the low end, 1 at the high end; None for what has no place (not finite; not above 0 on a log axis)."""
        if not math.isfinite(value) or (self.is_log and value <= 0):
            return None
        low, high = (math.log10(self.low), math.log10(self.high)) if self.is_log else (self.low, self.high)
        return ((math.log10(value) if self.is_log else value) - low) / (high - low)

    def ticks(self, wanted: int = 6) -> list[float]:
        """Round numbers within the range: multiples of 1, 2 or 5 times a power of ten; on a log axis powers of ten,
        with their doubles and fives where there are few."""
        if self.is_log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(decades) <= 3 else (1,)
            every = max(1, round(len(decades) / (wanted + 1)))
            found = [step * 10.0**decade for decade in decades if decade % every == 0 for step in steps]
        else:
            step = _round_step((self.high - self.low) / wanted)
            first = math.ceil(self.low / step)
            found = [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [tick for tick in found if self.low <= tick <= self.high]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def number(value: float | None, digits: int = 4) -> str:
    """Up to that many digits: 3.581, 1234, 1.2e-05; a dash for None or NaN."""
    if value is None or not math.isfinite(value):
        return "-"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 2}e}"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def tick_text(value: float) -> str:
    """Short, for an axis: 0.25, 1.5K, 20M, 1e-05."""
    if abs(value) >= 1000:
        return ("-" if value < 0 else "") + count(abs(value))
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{value:.6g}"
