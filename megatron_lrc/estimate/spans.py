"""Estimated spans of time, in the unit that suits their size: an estimate has two or three digits, no more."""


def span(seconds: float) -> str:
    """`34 minutes` below an hour, `7.3 hours` below two days, else `12.4 days`."""
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 1:
        return "under a minute"
    if minutes < 59.5:
        return f"{minutes:.0f} minute{'s' if round(minutes) != 1 else ''}"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
