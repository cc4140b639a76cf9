"""tools/preprocess_data.py, called in this process: what it returns, what it refuses, what it leaves."""

from pathlib import Path

from tools_path import tool_main

preprocess_data = tool_main("preprocess_data")


def preprocess(*arguments: object) -> int:
    """The exit code."""
    return preprocess_data([str(argument) for argument in arguments])


def file_names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def check_refused(capsys, message: str, *arguments: object) -> None:
    """The exit code is 2, and this message is in the one line on stderr."""
    assert preprocess(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
