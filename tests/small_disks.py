"""Small disks to fill, or to make read-only."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096  # what a tmpfs gives at a time


@contextmanager
def small_disk_at(folder: Path, *, size: str) -> Iterator[Path]:
    """A disk of its own, of such a size as 1m, in a new folder; skips the test where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(disk: Path, access: str) -> None:
    """access: ro or rw."""
    subprocess.run(["mount", "-o", f"remount,{access}", str(disk)], check=True)


def fill_disk(disk: Path, free: int) -> Path:
    """A file that leaves `free` bytes."""
    ballast = disk / "ballast"
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs(disk).f_bavail * PAGE - free)
    assert os.statvfs(disk).f_bavail * PAGE == free
    return ballast
