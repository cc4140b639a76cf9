"""Numbers of tokens as people write them: 18B, 450M, 1.5e9."""

from decimal import Decimal, InvalidOperation

from megatron_lrc.config import ConfigError

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_token_count(value: str | int | float, flag: str = "--max-tokens") -> int:
    """18B as 18,000,000,000. ConfigError, naming `flag`, for what is no whole number of 1 or more."""
    text = str(value).strip()
    scale = _SUFFIXES.get(text[-1:].upper(), 1)
    try:
        number = Decimal(text[:-1] if scale > 1 else text) * scale
    except InvalidOperation:
        number = Decimal(0)
    if isinstance(value, bool) or not number.is_finite() or number < 1 or number != number.to_integral_value():
        raise ConfigError(f"{flag} {value} is no number of tokens. Give one such as 1000000, 450M, 18B or 1.5e9.")
    return int(number)
