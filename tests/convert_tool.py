"""tools/convert_from_hf.py, called in this process."""

from pathlib import Path

import pytest

from tools_path import convert_from_hf


def convert(source: Path, output: Path, *flags: str) -> None:
    assert convert_from_hf(["--hf-model", str(source), "--output", str(output), *flags]) == 0


def refused_conversion(capsys: pytest.CaptureFixture[str], source: Path, output: Path, *flags: str) -> str:
    """The one line that it is refused with; nothing is left behind."""
    capsys.readouterr()  # of the teacher's making
    before = sorted(output.parent.iterdir())
    assert convert_from_hf(["--hf-model", str(source), "--output", str(output), *flags]) == 2
    assert sorted(output.parent.iterdir()) == before
    *progress, message = capsys.readouterr().err.splitlines()
    assert message.startswith("convert_from_hf.py: ") and all("|" in line or not line for line in progress)
    return message
