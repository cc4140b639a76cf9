"""Stopping a run on request: SIGTERM, SIGINT (Ctrl-C), SIGHUP (a terminal that is gone), SIGUSR1, a time limit, a
step, or a file named `stop` in the run directory.

A signal reaches one process or all, at any moment, and all of them have to stop after the same step. So each has a vote
for every reason, and the votes are summed in the all-reduce of the loss sums that every step has anyway; they are read
with the one number that the host waits for anyway (whether the losses are finite). After a validation or a checkpoint,
which may take long, the processes ask each other once more, in a collective of their own.

The first signal is noted and the step finished. The same one again, at least COPIES_WITHIN seconds later, ends the
process at once; sooner it is a copy, since a scheduler may signal torchrun and the processes that torchrun forwards
it to. When all is saved no signal matters any more. A thread takes note, not a Python handler: that would run only
when the main thread comes back from a collective.

torchrun signals a process's whole group: what a training process has started must not die of it, or the step or the
checkpoint fails. Forked children (data loaders, checkpoint writers) leave the group, and end by SIGTERM as any process
does. The process that writes checkpoints in the background has a session of its own (`background_writer.py`).
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from megatron_lrc.checkpoints.run_directory import RunState
from megatron_lrc.config import Config
from megatron_lrc.console import say
from megatron_lrc.mcore.distributed import Groups, sum_over_world
from megatron_lrc.train.step import Votes

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
STOP_FILE = "stop"
#: What `Votes.stop` counts; the first one with a vote is the one named.
REASONS = (*(number.name for number in SIGNALS), "--exit-duration-in-mins", f"the file {STOP_FILE}")
#: Seconds within which a repeated signal is taken for a copy of the first; of Ctrl-C, which somebody types, fewer.
COPIES_WITHIN, KEYS_WITHIN = 3.0, 1.0


class Stopping:
    """Collects requests to stop, while entered as a context, and has all processes agree on them."""

    def __init__(self, config: Config, state: RunState, groups: Groups):
        self._config, self._state, self._groups = config, state, groups
        self._start = time.monotonic()
        self._watch = SignalWatch()
        self._heard = [False] * len(REASONS)
        self._is_at_exit_step = False

    def __enter__(self) -> None:
        self._watch.start()

    def __exit__(self, *_: object) -> None:
        self._watch.stop()

    def note_saved(self, *, ends_process: bool) -> None:
        """From here on a signal asks for nothing: neither while this is entered nor, if the process ends, after it."""
        self._watch.is_saved, self._watch.is_last = True, ends_process

    def after_step(self, votes: Votes) -> None:
        """Take note of all processes' votes, summed in the step that is done; alike on every rank."""
        self._hear(votes)
        interval = self._config.training.exit_interval
        self._is_at_exit_step = interval is not None and self._state.step % interval == 0

    def ask(self) -> None:
        """Have the processes agree outside a step. Collective."""
        votes = Votes(self.requests()).to_tensor(self._groups.device)
        self._hear(Votes.from_values(sum_over_world(votes).tolist()))

    @property
    def is_asked(self) -> bool:
        return self._is_at_exit_step or any(self._heard)

    @property
    def is_urgent(self) -> bool:
        """Whether a signal asks, after which the processes may be killed soon."""
        return any(self._heard[: len(SIGNALS)])

    def finish(self) -> str | None:
        """When the state is saved: remove the stop file. The words to end with, if the run is to be continued."""
        stop_file = self._stop_file()
        if stop_file and self._groups.is_main_rank and self._heard[REASONS.index(f"the file {STOP_FILE}")]:
            _remove(stop_file)
        step, steps, save = self._state.step, self._config.train_iters, self._config.checkpoint.save
        if not self.is_asked or step == steps:
            return None
        reason = next((name for name, heard in zip(REASONS, self._heard, strict=True) if heard), "--exit-interval")
        what_next = f"go on with --load {save}" if save else "nothing was saved, for want of --save"
        return f"stopped at step {step} of {steps}: {reason}; {what_next}"

    def _hear(self, votes: Votes) -> None:
        self._heard = [heard or vote > 0 for heard, vote in zip(self._heard, votes.stop, strict=True)]

    def requests(self) -> list[bool]:
        """For which of REASONS this process asks to stop."""
        minutes, stop_file = self._config.training.exit_duration_in_mins, self._stop_file()
        signals = [number in self._watch.received for number in SIGNALS]
        if not self._groups.is_main_rank:  # one clock and one look at the file system are enough
            return [*signals, False, False]
        is_late = minutes is not None and time.monotonic() - self._start >= 60 * minutes
        return [*signals, is_late, stop_file is not None and stop_file.is_file()]

    def _stop_file(self) -> Path | None:
        save = self._config.checkpoint.save
        return Path(save) / STOP_FILE if save else None


def _remove(stop_file: Path) -> None:
    try:
        stop_file.unlink(missing_ok=True)
    except OSError as error:
        _say(f"{stop_file} could not be removed ({error.strerror}): remove it, or the next start stops at once")


class SignalWatch:
    """Notes SIGNALS from `start` to `stop`, which the main thread calls; `received`: signal -> when it first came.

    is_saved: they are of no account any more. is_last: after `stop` they are ignored, since the process only ends.
    """

    def __init__(self) -> None:
        self.received: dict[int, float] = {}
        self.is_saved = self.is_last = False

    def start(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)  # as set_wakeup_fd demands
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # The handlers do nothing: C writes the signal's number to the pipe as it arrives.
        self._handlers_before = {number: signal.signal(number, lambda *_: None) for number in _heeded()}
        _watching.append(self)

    def stop(self) -> None:
        _watching.remove(self)
        for number, handler in self._handlers_before.items():
            signal.signal(number, signal.SIG_IGN if self.is_last else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _run(self) -> None:
        while number := os.read(self._read, 1)[0]:
            if number in SIGNALS and not self.is_saved:
                self._note(signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        now = time.monotonic()
        is_first = number not in self.received
        self.received.setdefault(number, now)
        if self._is_again(number, now):
            _say(f"{number.name} again: ends at once, without saving")
            os._exit(128 + number)
        if is_first:
            within = KEYS_WITHIN if number == signal.SIGINT else COPIES_WITHIN
            _say(f"{number.name}: the run stops after this step; again after {within:.0f} s: at once")

    def _is_again(self, number: signal.Signals, now: float) -> bool:
        typed = self.received.get(signal.SIGINT, now)
        if number in (signal.SIGINT, signal.SIGTERM) and now - typed >= KEYS_WITHIN:
            return True  # torchrun answers a second Ctrl-C with SIGTERM
        return number != signal.SIGINT and now - self.received[number] >= COPIES_WITHIN


#: The watch that is on, if any: what a forked child has to be rid of.
_watching: list[SignalWatch] = []


def _heeded() -> list[signal.Signals]:
    """Without SIGHUP under nohup, whose purpose is that a terminal may go."""
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if not (number == signal.SIGHUP and is_nohup)]


def _say(line: str) -> None:
    say(f"rank {os.environ.get('RANK', '0')}: {line}", sys.stderr)


def _be_an_ordinary_child() -> None:
    """In a forked child: out of the process group; SIGTERM ends it, the others are not meant for it."""
    if not _watching:
        return
    _watching.clear()
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


os.register_at_fork(after_in_child=_be_an_ordinary_child)
