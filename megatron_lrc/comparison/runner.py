"""Trains runs as processes of their own, some at a time. What is finished is not trained again; what was interrupted
goes on from its checkpoint; what fails is reported with its last line, and the others go on."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from megatron_lrc.comparison.material import last_step
from megatron_lrc.comparison.run_plan import Run
from megatron_lrc.config import ConfigError, load_yaml, parse_config
from megatron_lrc.train.jsonl import read_records
from megatron_lrc.train.progress import count, duration


@dataclass(frozen=True, slots=True)
class Outcome:
    """failure: the last line of a run that did not finish, else empty."""

    run: Run
    directory: Path
    failure: str = ""


def is_complete(run: Run, directory: Path) -> bool:
    """Whether the run directory holds this very run, finished: its settings, and the validation after the last step."""
    return is_of(run, directory) and last_step(directory / "validation.jsonl") == run.steps


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
    """Trains into OUTPUT/runs, logs into OUTPUT/logs. material_time: of the last change to teacher and data."""

    def __init__(self, output: Path, *, jobs: int, threads: int, material_time: float, say: Callable[[str], None]):
        self._runs, self._logs = output / "runs", output / "logs"
        self._jobs, self._material_time, self._say = jobs, material_time, say
        self._environment = environment(threads)
        self._live: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._is_stopping = False

    def train(self, runs: Sequence[Run]) -> dict[str, Outcome]:
        """Name -> outcome, of all of them. Longest first, so that none is left alone at the end."""
        outcomes = {run.name: Outcome(run, self._runs / run.name) for run in runs}
        todo = [run for run in {run.name: run for run in runs}.values() if not self._is_done(run)]
        if len(todo) < len(outcomes):
            self._say(f"{len(outcomes) - len(todo)} of {len(outcomes)} runs are already in {self._runs}")
        todo.sort(key=lambda run: -run.tokens)
        start, tokens, total = time.monotonic(), 0, sum(run.tokens for run in todo)
        with ThreadPoolExecutor(self._jobs) as pool:
            try:
                futures = [pool.submit(self._train, run) for run in todo]
                for number, future in enumerate(as_completed(futures), 1):
                    outcome = future.result()
                    outcomes[outcome.run.name] = outcome
                    tokens += outcome.run.tokens
                    left = (time.monotonic() - start) * (total - tokens) / tokens
                    self._say(f"[{number}/{len(todo)}] {_line(outcome)}; about {duration(left)} left")
            except BaseException:
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise
        return outcomes

    def _is_done(self, run: Run) -> bool:
        directory = self._runs / run.name
        return is_complete(run, directory) and not self._is_older_than_material(directory)

    def _is_older_than_material(self, directory: Path) -> bool:
        return (directory / "metrics.jsonl").stat().st_mtime < self._material_time

    def _can_go_on(self, run: Run, directory: Path) -> bool:
        """Whether it is this run, on this material, stopped before its last step: trained from its checkpoint on, it
        will be complete. One that only lacks the last validation would not make up for it."""
        return (
            is_of(run, directory)
            and 0 < last_step(directory / "metrics.jsonl") < run.steps
            and not self._is_older_than_material(directory)
        )

    def _train(self, run: Run) -> Outcome:
        directory, log = self._runs / run.name, self._logs / f"{run.name}.log"
        if directory.exists() and not self._can_go_on(run, directory):
            shutil.rmtree(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "megatron_lrc", "train", *flags_of(run, directory)]
        with log.open("w") as file, self._lock:
            if self._is_stopping:
                return Outcome(run, directory, "stopped")
            # A session of its own: Ctrl-C is for this program, which then stops them.
            child = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
            self._live.add(child)
        code = child.wait()
        with self._lock:
            self._live.discard(child)
        if code == 0 and is_complete(run, directory):
            return Outcome(run, directory)
        return Outcome(run, directory, f"{last_line(log)} (exit code {code}; all of it in {log})")

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
    if outcome.failure:
        return f"{run.name} FAILED: {outcome.failure}"
    record = list(read_records(outcome.directory / "validation.jsonl"))[-1]
    return f"{run.name}: held-out loss {record['lm_loss']:.4f} after {count(run.tokens)} tokens"
