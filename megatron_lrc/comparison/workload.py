"""Which runs of a comparison are done and which are not, and how long the others will take."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lrc.comparison.material import last_step
from megatron_lrc.comparison.run_plan import Run
from megatron_lrc.comparison.runner import Runner, is_of, saved_steps
from megatron_lrc.train.jsonl import read_records
from megatron_lrc.train.progress import count


@dataclass(frozen=True, slots=True)
class Piece:
    """One run. steps: taken so far, of this very run. unscored: parts of its score that are missing.

    tokens_per_second: as measured in this run, or else in the contestant's others, or else the slowest that has been
    measured of anybody; None if nothing has.
    """

    run: Run
    steps: int
    is_trained: bool
    unscored: tuple[str, ...]
    tokens_per_second: float | None

    @property
    def seconds_left(self) -> float | None:
        """Of training steps; scoring and starting are not estimated."""
        if self.is_trained:
            return 0.0
        if self.tokens_per_second is None:
            return None
        return self.run.tokens * (1 - self.steps / max(self.run.steps, 1)) / self.tokens_per_second

    @property
    def state(self) -> str:
        if not self.is_trained:
            return f"step {self.steps} of {self.run.steps}" if self.steps else "not begun"
        return f"trained; to be scored on: {', '.join(self.unscored)}" if self.unscored else "done"


@dataclass(frozen=True, slots=True)
class Workload:
    """pieces: in the order of the comparison, each once."""

    pieces: tuple[Piece, ...]
    jobs: int

    @classmethod
    def of(cls, grid: Sequence[Run], scored: Sequence[Run], runner: Runner, jobs: int) -> "Workload":
        """scored: the runs whose students are scored; those of the grid, which may be among them, are not."""
        unique = {run.name: run for run in (*grid, *scored)}.values()
        to_score = {run.name for run in scored}
        measured = {run.name: pace for run in unique if (pace := _measured(run, runner)) is not None}
        of_contestant: dict[str, list[float]] = {}
        for run in unique:
            if run.name in measured:
                of_contestant.setdefault(run.contestant.name, []).append(measured[run.name])
        slowest = min(measured.values(), default=None)

        def rate(run: Run) -> float | None:
            others = of_contestant.get(run.contestant.name)
            return measured.get(run.name, statistics.median(others) if others else slowest)

        pieces = (_piece(run, runner, rate(run), is_scored=run.name in to_score) for run in unique)
        return cls(tuple(pieces), jobs)

    def hours_left(self) -> float | None:
        """Of training, with `jobs` runs at a time; None where a rate is not known."""
        left = [piece.seconds_left for piece in self.pieces]
        if any(seconds is None for seconds in left):
            return None
        return sum(seconds for seconds in left if seconds) / self.jobs / 3600

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Names of the columns, cells."""
        names = ["run", "state", "tokens", "tokens/s", "minutes of training left"]
        return names, [
            [
                piece.run.name,
                piece.state,
                count(piece.run.tokens),
                "?" if piece.tokens_per_second is None else count(piece.tokens_per_second),
                "?" if piece.seconds_left is None else f"{piece.seconds_left / 60:.0f}",
            ]
            for piece in self.pieces
        ]

    def summary(self) -> str:
        done = sum(piece.is_trained and not piece.unscored for piece in self.pieces)
        hours = self.hours_left()
        left = (
            "how long the others take is not known yet"
            if hours is None
            else f"about {hours:.1f} hours of training left"
        )
        return f"{done} of {len(self.pieces)} runs are done; {left}"


def _measured(run: Run, runner: Runner) -> float | None:
    """Tokens per second of its records, of whatever settings a run of this name had; the first left out, if there are
    others."""
    rates = [record["tokens_per_second"] for record in read_records(runner.directory(run) / "metrics.jsonl")]
    return statistics.median(rates[1:] or rates) if rates else None


def _piece(run: Run, runner: Runner, rate: float | None, *, is_scored: bool) -> Piece:
    directory = runner.directory(run)
    steps = max(0, last_step(directory / "metrics.jsonl"), saved_steps(directory)) if is_of(run, directory) else 0
    is_trained = runner.is_done(run, scored=False)
    unscored = runner.unscored_parts(run) if is_scored else []
    return Piece(run, run.steps if is_trained else steps, is_trained, tuple(unscored), rate)
