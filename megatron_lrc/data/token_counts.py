"""Numbers of tokens as people write them: 18B, 450M, 1.5e9."""

from megatron_lrc.config import ConfigError, parse_count


def parse_token_count(value: str | int | float, flag: str = "--max-tokens") -> int:
    """18B as 18,000,000,000. ConfigError, naming `flag`, for what is no whole number of 1 or more."""
    number = None if isinstance(value, bool) else parse_count(value)
    if number is None or number < 1:
        raise ConfigError(f"{flag} {value} is no number of tokens. Give one such as 1000000, 450M, 18B or 1.5e9.")
    return number
