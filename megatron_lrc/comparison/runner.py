"""Trains runs as processes of their own, some at a time, and scores their students. What is finished is not done again;
what was interrupted goes on from its checkpoint; what fails is reported with its last line, and the others go on."""

import itertools
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_lrc.comparison.material import last_step
from megatron_lrc.comparison.run_plan import Run
from megatron_lrc.comparison.scoring import EVALUATION, Kind, Scoring, score
from megatron_lrc.config import ConfigError, load_yaml, parse_config
from megatron_lrc.locks import lock_of_run
from megatron_lrc.train.jsonl import read_records
from megatron_lrc.train.progress import count, duration

#: Nothing is started with less time left: it would hardly come to its first step.
LEAST_SECONDS = 120.0
#: Exit code of what was not started.
STOPPED = -1


@dataclass(frozen=True, slots=True)
class Outcome:
    """failure: the last line of a run that did not finish, else empty. unscored: why its student has not been scored
    on everything, else empty. is_stopped: the time was over before the run, or its scoring, was finished."""

    run: Run
    directory: Path
    failure: str = ""
    unscored: str = ""
    is_stopped: bool = False

    @property
    def is_trained(self) -> bool:
        return not self.failure and is_complete(self.run, self.directory)


def is_complete(run: Run, directory: Path) -> bool:
    """Whether the run directory holds this very run, finished: its settings, and the validation after the last step."""
    return is_of(run, directory) and last_step(directory / "validation.jsonl") == run.steps


def saved_steps(directory: Path) -> int:
    """Of the newest checkpoint; -1 without one. Named as by `checkpoints/run_directory.py`, which loads torch."""
    saved = [path.parent.name.removeprefix("iter_") for path in directory.glob("iter_*/run.json")]
    return max((int(steps) for steps in saved if steps.isdecimal()), default=-1)


def is_of(run: Run, directory: Path) -> bool:
    """Whether the settings that the directory was written with are this run's."""
    try:
        written = load_yaml(directory / "config.yaml")
    except ConfigError:
        return False
    return written.to_dict() == parse_config(flags_of(run, directory)).resolved(1).to_dict()


def flags_of(run: Run, directory: Path) -> list[str]:
    """Those of the training process."""
    return [*run.flags, "--save", str(directory), "--load", "auto"]


class Runner:
    """Trains into OUTPUT/runs, logs into OUTPUT/logs. material_time: of the last change to teacher and data.

    scoring: what finished runs are scored on. deadline: of time.monotonic; from then on nothing is
    started, and what is under way saves and ends.
    """

    def __init__(
        self,
        output: Path,
        *,
        jobs: int,
        threads: int,
        material_time: float,
        say: Callable[[str], None],
        scoring: Scoring,
        deadline: float = math.inf,
    ):
        self._runs, self._logs = output / "runs", output / "logs"
        self._jobs, self._material_time, self._say = jobs, material_time, say
        self._scoring, self._deadline = scoring, deadline
        self._environment = environment(threads)
        self._live: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._is_stopping = False

    def train(
        self, runs: Sequence[Run], *, scored: bool = True, after: Callable[[dict[str, Outcome]], None] | None = None
    ) -> dict[str, Outcome]:
        """Name -> outcome, of all of them. Longest first, so that none is left alone at the end; of equal ones those of
        the first seed, so that a comparison which is stopped has everybody.

        scored: whether to score them too. after: is told the outcomes so far whenever a run has come to its end.
        """
        outcomes = {run.name: Outcome(run, self.directory(run)) for run in runs}
        todo = [run for run in {run.name: run for run in runs}.values() if not self.is_done(run, scored=scored)]
        known = {name: outcome for name, outcome in outcomes.items() if outcome.run not in todo}
        if known:
            self._say(f"{len(known)} of {len(outcomes)} runs are already in {self._runs}")
        seeds = list(dict.fromkeys(run.seed for run in runs))
        todo.sort(key=lambda run: (-run.tokens, seeds.index(run.seed)))
        start, tokens, total = time.monotonic(), 0, sum(run.tokens for run in todo)
        with self._stopped_at_deadline(), ThreadPoolExecutor(self._jobs) as pool:
            try:
                futures = [pool.submit(self._train_and_score, run, scored) for run in todo]
                for number, future in enumerate(as_completed(futures), 1):
                    outcome = future.result()
                    known[outcome.run.name] = outcome
                    tokens += outcome.run.tokens
                    left = (time.monotonic() - start) * (total - tokens) / max(tokens, 1)
                    if not self._is_stopping:
                        self._say(f"[{number}/{len(todo)}] {_line(outcome)}; about {duration(left)} left")
                    if after and not outcome.is_stopped:
                        after({name: known[name] for name in outcomes if name in known})
            except BaseException:
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise
        return {name: known[name] for name in outcomes}

    @property
    def is_stopped(self) -> bool:
        """Whether the time was over."""
        return self._is_stopping

    def score_teacher(self, record: Path) -> str:
        """As `score`, of the teacher itself."""
        if not self._scoring.missing(record, "teacher"):
            return ""
        self._say("scoring the teacher")
        with self._stopped_at_deadline():
            return self._score(self._scoring.teacher, record, "teacher", "teacher")

    def directory(self, run: Run) -> Path:
        return self._runs / run.name

    def is_done(self, run: Run, *, scored: bool = True) -> bool:
        """Trained on this material, and scored as asked, if it can still be."""
        directory = self.directory(run)
        if not is_complete(run, directory) or self._is_older_than_material(directory):
            return False
        return not (scored and self.unscored_parts(run))

    def unscored_parts(self, run: Run) -> list[str]:
        return list(self._scoring.missing(self.directory(run) / EVALUATION, run.kind))

    def _is_older_than_material(self, directory: Path) -> bool:
        records = (directory / name for name in ("metrics.jsonl", "validation.jsonl"))
        return max((path.stat().st_mtime for path in records if path.exists()), default=0.0) < self._material_time

    def _can_go_on(self, run: Run, directory: Path) -> bool:
        """Whether it is this run, on this material, stopped before its last step: trained from its checkpoint on, it
        will be complete. One that only lacks the last validation would not make up for it."""
        return (
            is_of(run, directory)
            and 0 < saved_steps(directory) < run.steps
            and not self._is_older_than_material(directory)
        )

    def _train_and_score(self, run: Run, scored: bool) -> Outcome:
        directory = self.directory(run)
        if not self.is_done(run, scored=False) or (scored and saved_steps(directory) < run.steps):
            outcome = self._train(run)
            if outcome.failure or outcome.is_stopped:
                return outcome
        if not scored:
            return Outcome(run, directory)
        failed = self._score(directory, directory / EVALUATION, run.kind, run.name)
        return Outcome(run, directory, unscored=failed, is_stopped=bool(failed) and self._is_stopping)

    def _train(self, run: Run) -> Outcome:
        directory = self.directory(run)
        if directory.exists() and not self._can_go_on(run, directory):
            with lock_of_run(directory):  # a comparison that was killed leaves its runs behind
                self._set_aside(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "megatron_lrc", "train", *flags_of(run, directory)]
        log = self._logs / f"{run.name}.log"
        code = self._call(command, log)
        if code == 0 and is_complete(run, directory):
            return Outcome(run, directory)
        if self._is_stopping:
            return Outcome(run, directory, is_stopped=True)
        return Outcome(run, directory, f"{last_line(log)} (exit code {code}; all of it in {log})")

    def _set_aside(self, directory: Path) -> None:
        """Make room for a run of this name. What somebody has trained is kept: other settings have been given since, or
        other defaults have come with another version."""
        if saved_steps(directory) <= 0:
            shutil.rmtree(directory)
            return
        folder = self._runs.with_name("set-aside")
        folder.mkdir(exist_ok=True)
        place = next(
            path for number in itertools.count(1) if not (path := folder / f"{directory.name}-{number}").exists()
        )
        directory.rename(place)
        self._say(f"{directory.name}: trained with other settings or data, or not to its end; now in {place}")

    def _score(self, model: Path, record: Path, kind: Kind, name: str) -> str:
        """Empty if everything is on record, else what failed."""
        log = self._logs / f"{name}-score.log"
        call = partial(self._call, log=log)
        failed = score(model, record, kind, self._scoring, call)
        return f"scoring failed at {failed}: {last_line(log)} (all of it in {log})" if failed else ""

    def _call(self, command: Sequence[str], log: Path) -> int:
        """The exit code of a process that logs there; not started when it is time to stop."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file, self._lock:
            if self._is_stopping or time.monotonic() + LEAST_SECONDS > self._deadline:
                self._is_stopping = True
                return STOPPED
            # A session of its own: Ctrl-C is for this program, which then stops them.
            child = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
            self._live.add(child)
        code = child.wait()
        with self._lock:
            self._live.discard(child)
        return code

    @contextmanager
    def _stopped_at_deadline(self) -> Iterator[None]:
        if self._deadline == math.inf:
            yield
            return
        timer = threading.Timer(max(0.0, self._deadline - time.monotonic()), self._stop)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _stop(self) -> None:
        """Ask the runs under way to save and end; another call of the comparison goes on from there."""
        with self._lock:
            self._is_stopping = True
            for child in self._live:
                child.terminate()


def environment(threads: int) -> dict[str, str]:
    """For the processes started: the package as imported here, their number of threads, no torchrun around them."""
    root = str(Path(__file__).parents[2])
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH")]))
    # Threads that wait must not spin: beside other processes spinning takes the cores that the work needs.
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}


def call_logged(logs: Path, name: str, command: Sequence[str], *, threads: int, say: Callable[[str], None]) -> None:
    """Run one command of the preparation; ConfigError with its last line if it fails."""
    logs.mkdir(parents=True, exist_ok=True)
    log, start = logs / f"material-{name}.log", time.monotonic()
    say(f"material: {name} ...")
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment(threads))
    if done.returncode != 0:
        raise ConfigError(f"making the material failed at {name}: {last_line(log)} All of it is in {log}.")
    say(f"material: {name} done in {duration(time.monotonic() - start)}")


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def _line(outcome: Outcome) -> str:
    run = outcome.run
    if outcome.failure or outcome.unscored:
        return f"{run.name} FAILED: {outcome.failure or outcome.unscored}"
    record = list(read_records(outcome.directory / "validation.jsonl"))[-1]
    return f"{run.name}: held-out loss {record['lm_loss']:.4f} after {count(run.tokens)} tokens"
