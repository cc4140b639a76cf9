"""What a cluster does to a training run, at a random moment: the disturbances that `chaos.py` deals out."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from run_comparison import complete, last_step
from worlds import LaunchedWorld, World

STEPS, SAVE_INTERVAL = 24, 3
#: Seconds in which every process has to be gone after a disturbance.
END_WITHIN = 20.0
DISK_BYTES = 64 << 20


class TooLate(Exception):
    """The run was through before it could be disturbed."""


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of its own at `folder`; False where none may be mounted."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    is_mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def full_disk(site: "Site") -> Iterator[None]:
    """Fill the run's disk but for some bytes. Where it has none of its own, its processes can write no large files."""
    disk, file = site.run.parent, site.run.parent / "ballast"
    if not disk.is_mount():
        for rank in map(psutil.Process, site.world.living()):
            for process in (rank, *rank.children()):  # which write in the background
                process.rlimit(psutil.RLIMIT_FSIZE, (40_000, 40_000))
        yield
        return
    free = site.random.choice([0, 4096, 300_000, 1_100_000, 1_300_000, 1_500_000])
    with open(file, "wb") as opened:
        while (size := shutil.disk_usage(disk).free - free) > 0:
            with contextlib.suppress(OSError):  # the run has taken some of it meanwhile
                os.posix_fallocate(opened.fileno(), os.fstat(opened.fileno()).st_size, size)
    try:
        yield
    finally:
        file.unlink()


# ------------------------------------------------------------------------------------------------ what is done to a run


@dataclass
class Site:
    """A running attempt and what a disturbance needs of it."""

    run: Path
    world: World | LaunchedWorld
    random: random.Random
    start: int  # the step at which it was continued
    damaged: set[Path] = field(default_factory=set)

    def until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            if not self.world.is_running:
                raise TooLate
            time.sleep(0.002)

    def until_some_step(self) -> None:
        step = min(self.start + self.random.randint(1, 2 * SAVE_INTERVAL), STEPS - 1)
        self.until(lambda: last_step(self.run) >= step)
        time.sleep(self.random.uniform(0, 0.05))

    def until_a_save(self, name: str = "") -> None:
        """Until one is under way that was not before, and has a file of this name."""
        before = set(self.run.glob("iter_*.partial-*"))
        self.until(lambda: any((path / name).exists() for path in set(self.run.glob("iter_*.partial-*")) - before))

    def kill(self, *, is_all: bool | None = None) -> None:
        """One rank, or all; left open, by chance."""
        victims = list(range(self.world.num_ranks))
        if not (self.random.random() < 0.5 if is_all is None else is_all):
            victims = [self.random.choice(victims)]
        for rank in victims:
            self.world.signal(rank, signal.SIGKILL)


def kill_one_rank(site: Site) -> None:
    site.until_some_step()
    site.kill(is_all=False)


def kill_all_ranks(site: Site) -> None:
    site.until_some_step()
    site.kill(is_all=True)


def terminate(site: Site) -> None:
    """It saves, and ends without an error."""
    site.until_some_step()
    if not site.world.is_running:
        raise TooLate
    site.world.terminate(site.random)
    assert set(site.world.wait(END_WITHIN)) == {site.world.code_when_stopped}, site.world.said(0)


def kill_before_the_first_save(site: Site) -> None:
    step = site.random.randint(0, SAVE_INTERVAL - 1)
    site.until(lambda: last_step(site.run) >= step)
    site.kill()


def kill_during_a_save(site: Site) -> None:
    site.until_a_save()
    time.sleep(site.random.uniform(0, 0.03))
    site.kill()


def kill_while_a_save_is_finished(site: Site) -> None:
    """The files are written; the index, run.json and the name are due."""
    site.until_a_save(site.random.choice([".metadata", "run.json"]))
    site.kill()


def fill_the_disk(site: Site) -> None:
    site.until_some_step()
    with full_disk(site):
        with contextlib.suppress(TooLate):  # it may end of it
            site.until(lambda: "could not be saved" in site.world.said(0) or last_step(site.run) == STEPS)
        site.kill(is_all=True)
        site.world.wait(END_WITHIN)


def truncate(path: Path, generator: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: generator.randrange(len(content))])


def flip_a_bit(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def delete(path: Path, _: random.Random) -> None:
    path.unlink()


def damage_with(change: Callable[[Path, random.Random], None]) -> Callable[[Site], None]:
    def damage(site: Site) -> None:
        """Of the newest checkpoint some file, between two starts."""
        site.until_some_step()
        site.until(lambda: len(complete(site.run)) > 1)
        site.kill(is_all=True)
        site.world.wait(END_WITHIN)
        newest = complete(site.run)[-1]
        change(site.random.choice(sorted(path for path in newest.iterdir() if path.stat().st_size)), site.random)
        site.damaged.add(newest)

    return damage


KINDS: dict[str, Callable[[Site], None]] = {
    "SIGKILL of one rank": kill_one_rank,
    "SIGKILL of all ranks": kill_all_ranks,
    "SIGTERM": terminate,
    "killed before the first save": kill_before_the_first_save,
    "killed during a save": kill_during_a_save,
    "killed while a save is finished": kill_while_a_save_is_finished,
    "disk full": fill_the_disk,
    "file truncated": damage_with(truncate),
    "bit flipped": damage_with(flip_a_bit),
    "file deleted": damage_with(delete),
}
FIRST = "killed before the first save"
