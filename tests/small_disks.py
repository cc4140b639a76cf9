"""Filling a small disk: the fixture `small_disk` of tests/unit."""

import os
from pathlib import Path

PAGE = 4096  # what a tmpfs gives at a time


def fill_disk(disk: Path, free: int) -> Path:
    """A file that leaves `free` bytes."""
    ballast = disk / "ballast"
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs(disk).f_bavail * PAGE - free)
    assert os.statvfs(disk).f_bavail * PAGE == free
    return ballast
