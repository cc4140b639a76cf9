"""Colour: only warnings and errors, only on a terminal that has it, seen through a pseudo-terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lrc.console import say

ROOT = Path(__file__).parents[2]
LINES = ("warning: low", "error: bad", "step 1/2 | error: not at the start")
COLOURED = "\033[33mwarning: low\033[0m\n\033[31merror: bad\033[0m\nstep 1/2 | error: not at the start\n"


def read_terminal(terminal: int, num_lines: int) -> str:
    """What was written to the other end of a pseudo-terminal, its line ends as they were."""
    text = b""
    while text.count(b"\n") < num_lines:
        text += os.read(terminal, 4096)
    return text.decode().replace("\r\n", "\n")


def shown_on_a_terminal() -> str:
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal:
        for line in LINES:
            say(line, terminal)
        text = read_terminal(ours, len(LINES))
    os.close(ours)
    return text


@pytest.mark.parametrize(
    ("environment", "is_coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),  # as no-color.org says
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_a_terminal_gets_colours_unless_it_has_none_or_nobody_wants_them(monkeypatch, environment, is_coloured):
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert shown_on_a_terminal() == (COLOURED if is_coloured else "".join(f"{line}\n" for line in LINES))


def test_a_pipe_gets_plain_lines(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    for line in LINES:
        say(line)
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in LINES)


def test_a_commands_error_is_red_on_a_terminal_and_plain_in_a_file(tmp_path):
    command = [sys.executable, "-m", "megatron_lrc", "report", str(tmp_path / "none")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    plain = subprocess.run(command, capture_output=True, text=True, env=environment).stderr
    ours, theirs = os.openpty()
    subprocess.run(command, stderr=theirs, env=environment)
    shown = read_terminal(ours, 1)
    os.close(ours)
    os.close(theirs)
    assert plain.startswith("python -m megatron_lrc report: ") and plain.count("\n") == 1
    assert shown == f"\033[31m{plain.rstrip()}\033[0m\n"
