"""Large whole numbers as people write them: 10B for ten billion, 500M, 1.5e9."""

from decimal import Decimal, DecimalException

#: What a letter after a number multiplies it by, the largest first.
SUFFIXES = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3}


def parse_count(value: str | int | float) -> int | None:
    """`10B`, `1.5e9` or 500 as a whole number, exactly: 0.3B is 300,000,000. None if it is no such number."""
    text = str(value).strip()
    scale = SUFFIXES.get(text[-1:].upper(), 1)
    try:
        number = Decimal(text[:-1] if scale > 1 else text) * scale
    except DecimalException:  # no number, or one beyond what Decimal holds
        return None
    if not number.is_finite() or number.adjusted() > 18 or number != number.to_integral_value():
        return None
    return int(number)


def exact_count(number: int) -> str:
    """As a flag: 10B, 1500M, 49152."""
    for suffix, scale in SUFFIXES.items():
        if number and number % scale == 0:
            return f"{number // scale}{suffix}"
    return str(number)


def short_count(number: int) -> str:
    """To three digits, for people: 49.2M."""
    for suffix, scale in SUFFIXES.items():
        if number >= scale * 0.9995:
            return f"{number / scale:.3g}{suffix}"
    return str(number)
