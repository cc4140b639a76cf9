"""Disturbs training runs again and again; each has to come out as if nothing had been. Prints what it did as a table.

    python tests/chaos.py --kills 50 --seed 1

A run is started, disturbed at a random moment, started again with --load auto, and so on, until it is through. Checked:
* every start continues the newest checkpoint that is whole, and all ranks end within END_WITHIN after a disturbance;
* no good checkpoint is changed, ever (hashes of all files);
* metrics.jsonl has every step once, with the undisturbed run's numbers; so has validation.jsonl, but for validations
  that a run left out since it was told to stop;
* the last checkpoint holds the undisturbed run's tensors bit for bit: parameters, optimizer state, step.
The undisturbed run saves in the foreground, half of the disturbed ones in the background.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from disturbances import END_WITHIN, FIRST, KINDS, SAVE_INTERVAL, STEPS, Site, TooLate, small_disk
from hf_teachers import write_llama
from run_comparison import Ledger, check_same, lines
from tiny_data import write_counting
from worlds import LaunchedWorld, World, training_flags


@dataclass(frozen=True)
class Scenario:
    """How a run is laid out and started."""

    name: str
    num_ranks: int
    flags: tuple[str, ...]
    is_async: bool
    is_launched: bool = False  # by the script and torchrun, as a user does

    @property
    def layout(self) -> tuple[int, tuple[str, ...]]:
        return self.num_ranks, self.flags


TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", "2")
DP2 = ("--use-distributed-optimizer",)
DATA_LOADERS = ("--num-workers", "1")  # they outlive a killed rank by up to 5 s
#: Disturbances of one run: of more, the last ones would come too late.
PER_RUN = 5
SHORT = [Scenario("TP2", 2, TP2, False), Scenario("DP2 async", 2, DP2, True)]
LONG = [
    *SHORT,
    Scenario("PP2 async", 2, (*PP2, *DATA_LOADERS), True),
    Scenario("TP2 x PP2 async", 4, (*TP2, *PP2), True),
    Scenario("TP2 async", 2, TP2, True),
    Scenario("DP2", 2, DP2, False),
    Scenario("PP2", 2, PP2, False),
]
LAUNCHED = [
    Scenario("PP2 async, torchrun", 2, PP2, True, is_launched=True),
    Scenario("DP2, torchrun", 2, DP2, False, is_launched=True),
]


# ------------------------------------------------------------------------------------------------ a run


@dataclass(frozen=True)
class Event:
    """A disturbance and the start after it."""

    scenario: Scenario
    kind: str
    resumed_at: int
    is_newest: bool  # of the checkpoints that were there, whole or not
    lost_steps: int


class Chaos:
    """Disturbed runs of one teacher and data set; `events` is what was done."""

    def __init__(self, folder: Path, teacher: str, data: str, seed: int):
        self._folder, self._teacher, self._data = folder, teacher, data
        self._random = random.Random(seed)
        self._undisturbed: dict[tuple, Path] = {}
        self._runs = 0
        self.num_runs = 0  # that came out right
        self.events: list[Event] = []

    def disturb(self, scenario: Scenario, kinds: list[str]) -> None:
        """A run to which all this happens, as far as it lasts; AssertionError if it matters."""
        expected = self._undisturbed_run(scenario)
        self._runs += 1
        with small_disk(self._folder / f"disk{self._runs}"):
            run = self._folder / f"disk{self._runs}" / "run"
            ledger = Ledger(run)
            waiting = list(kinds)
            pending: str | None = None
            while True:
                best, is_newest = ledger.best()
                with self._start(scenario, run) as world:
                    started = self._await_start(run, world)
                    assert started["checkpoint"] == (str(best) if best else None), (pending, started, ledger.damaged)
                    if pending:
                        assert started["lost_steps"] == 0 or pending != "SIGTERM", started
                        self.events.append(Event(scenario, pending, started["step"], is_newest, started["lost_steps"]))
                    pending = waiting.pop(0) if waiting else None
                    site = Site(run, world, self._random, started["step"])
                    try:
                        if pending:
                            KINDS[pending](site)
                    except TooLate:
                        pending = None
                    codes = world.wait(END_WITHIN if pending else 200)
                    assert None not in codes, (pending, last_words(world))
                    until_gone(world)
                ledger.check(site.damaged)
                if pending is None:
                    assert set(codes) == {0}, last_words(world)
                    break
            assert not ledger.damaged
            check_same(run, expected, steps=STEPS)
        self.num_runs += 1

    def _start(self, scenario: Scenario, run: Path) -> World | LaunchedWorld:
        flags = training_flags(self._teacher, self._data, run, *scenario.flags)
        flags += ["--train-iters", str(STEPS), "--save-interval", str(SAVE_INTERVAL), "--load", "auto"]
        flags += ["--eval-iters", "1", "--eval-interval", "6", *(["--async-save"] if scenario.is_async else [])]
        logs = self._folder / f"logs{self._runs}"
        if scenario.is_launched:
            return LaunchedWorld(scenario.num_ranks, flags, logs, MAX_RESTARTS="0")  # this driver starts it again
        return World(scenario.num_ranks, flags, logs)

    def _await_start(self, run: Path, world: World | LaunchedWorld) -> dict:
        before = len(lines(run, "starts.jsonl"))
        end = time.monotonic() + 120
        while len(lines(run, "starts.jsonl")) == before:
            assert world.is_running and time.monotonic() < end, last_words(world)
            time.sleep(0.005)
        return lines(run, "starts.jsonl")[-1]

    def _undisturbed_run(self, scenario: Scenario) -> Path:
        if scenario.layout not in self._undisturbed:
            self._runs += 1
            run = self._folder / f"undisturbed{self._runs}"
            with self._start(Scenario("", *scenario.layout, is_async=False), run) as world:
                assert set(world.wait(200)) == {0}, last_words(world)
            self._undisturbed[scenario.layout] = run
        return self._undisturbed[scenario.layout]


def last_words(world: World | LaunchedWorld) -> str:
    return "\n".join(world.said(rank)[-1500:] for rank in range(world.num_ranks))


def until_gone(world: World | LaunchedWorld) -> None:
    end = time.monotonic() + END_WITHIN
    while left := world.living():
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------ many runs


def table(events: list[Event]) -> str:
    """By disturbance: how often, through torchrun, resumed from, steps lost; all came out right, else there is none."""
    head = ["disturbance", "count", "by torchrun", "resumed: newest", "an older one", "anew", "steps lost", "at most"]
    rows = [head]
    for kind in KINDS:
        found = [event for event in events if event.kind == kind]
        lost = [event.lost_steps for event in found]
        new = sum(event.resumed_at == 0 for event in found)
        older = sum(event.resumed_at > 0 and not event.is_newest for event in found)
        numbers = (len(found), sum(event.scenario.is_launched for event in found), len(found) - older - new, older, new)
        rows.append([kind, *map(str, (*numbers, sum(lost), max(lost, default=0)))])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def plan(generator: random.Random, kinds: list[str]) -> list[str]:
    """A run's disturbances in random order, but what belongs before the first save first."""
    return sorted(generator.sample(kinds, len(kinds)), key=lambda kind: kind != FIRST)


def many_runs(
    folder: Path, *, kills: int, seed: int, with_torchrun: bool, say: Callable[[str], None]
) -> tuple[Chaos, str]:
    """At least so many disturbances, besides one of each kind through torchrun; and the table."""
    write_llama(folder / "teacher")
    generator, start = random.Random(seed), time.monotonic()
    chaos = Chaos(folder, str(folder / "teacher"), write_counting(folder / "counting"), seed)

    def disturb(scenario: Scenario, kinds: list[str]) -> None:
        chaos.disturb(scenario, plan(generator, kinds))
        say(f"{len(chaos.events)} disturbances, {time.monotonic() - start:.0f} s: {scenario.name}")

    turn = 0
    while with_torchrun and (missing := [kind for kind in KINDS if kind not in {event.kind for event in chaos.events}]):
        disturb(LAUNCHED[turn % len(LAUNCHED)], missing[:PER_RUN])
        turn += 1
    launched, turn = len(chaos.events), 0
    while len(chaos.events) - launched < kills:
        counts = Counter(event.kind for event in chaos.events)
        rarest = sorted(KINDS, key=lambda kind: (counts[kind], generator.random()))
        disturb(LONG[turn % len(LONG)], rarest[:PER_RUN])
        turn += 1
    return chaos, table(chaos.events)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="disturbances at least, besides those through torchrun")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-torchrun", action="store_true", help="leave out the runs through the launch script")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos") as folder:
        with_torchrun = not given.no_torchrun
        chaos, printed = many_runs(
            Path(folder), kills=given.kills, seed=given.seed, with_torchrun=with_torchrun, say=print_now
        )
    print(printed)
    print(f"seed {given.seed}: {chaos.num_runs} runs came out bit for bit as the undisturbed ones")


def print_now(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
