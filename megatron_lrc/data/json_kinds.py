"""What a value that was read from JSON is called in a message: by JSON's kinds, not by Python's types."""

from typing import Any


def kind_named(value: Any) -> str:
    """ "null", "true", "a number", "text", "a list" or "an object"."""
    if value is None:
        return "null"
    if isinstance(value, bool):  # before numbers: Python takes it for one
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "a number"
    return {str: "text", list: "a list", dict: "an object"}[type(value)]
