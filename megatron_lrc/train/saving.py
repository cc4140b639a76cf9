"""When a run's state is saved, and what the run does about a save that fails.

A failed save (a full disk) costs no more than itself: the run says so once, goes on, and tries again RETRIES times as
often as saves are due, until one succeeds. Only where it would be the last one does the run end with an error.
"""

from collections.abc import Callable

from megatron_lrc.checkpoints.run_directory import RunState
from megatron_lrc.config import Config, RunStopped
from megatron_lrc.mcore.checkpoint_writer import CheckpointWriter, SaveFailed
from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.train.step import Run, Votes

#: Tries between two saves that are due, after one that has failed.
RETRIES = 10


class Saving:
    """The checkpoints of one run. All but `is_writing` is collective. Does nothing without --save."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        run: Run,
        state: RunState,
        saved_step: int | None,
        say: Callable[[str], None],
    ):
        """saved_step: the step whose state --save holds already."""
        self._run, self._state, self._say = run, state, say
        self._writer = CheckpointWriter(config, groups) if config.checkpoint.save else None
        self._is_async = config.checkpoint.async_save
        self._step = saved_step  # of the last save that has not failed
        self._failure: str | None = None  # of the last save, if it has
        self._retry_at: int | None = None  # step
        self._interval = config.checkpoint.save_interval

    @property
    def is_writing(self) -> bool:
        return self._writer is not None and self._writer.is_writing

    @property
    def is_to_retry(self) -> bool:
        """After a save that has failed; alike on every rank, as failures are."""
        return self._retry_at is not None and self._state.step >= self._retry_at

    def after_step(self, votes: Votes) -> None:
        """Finish a save that all ranks have written. votes: summed over the ranks."""
        if votes.num_writing == 0:
            self.finish()

    def save(self) -> None:
        """Save the state, unless that is done. Returns when it is written, with --async-save when it is begun."""
        if self._writer is None or self._step == self._state.step:
            return
        self.finish()  # one at a time
        try:
            self._writer.start(self._state, self._run.stages, self._run.optimizer)
            self._step, self._retry_at = self._state.step, None
        except SaveFailed as error:
            self._note(f"step {self._state.step} could not be saved: {error}")
        if not self._is_async:
            self.finish()

    def finish(self) -> None:
        """Wait for a save that is being written."""
        if self._writer is None:
            return
        try:
            if path := self._writer.finish():
                self._failure = None
                self._say(f"saved {path}")
        except SaveFailed as error:
            self._note(str(error))

    def expect_other_tensors(self) -> None:
        """What is trained, and so saved, has changed."""
        self.finish()
        if self._writer is not None:
            self._writer.expect_other_tensors()

    def save_last(self) -> None:
        """Save and wait. RunStopped if the state is not on disk then."""
        self.save()
        self.finish()
        if self._failure:
            raise RunStopped(
                f"{self._failure}. Earlier checkpoints are untouched; go on from them when that is mended."
            )

    def close(self) -> None:
        """Nothing more will be saved."""
        if self._writer is not None:
            self._writer.close()

    def _note(self, failure: str) -> None:
        is_first = self._failure is None
        self._step, self._failure = None, failure
        again = ""
        if self._interval:
            steps = max(1, self._interval // RETRIES)
            self._retry_at = self._state.step + steps
            again = f"; the run goes on, and tries again after {'the next step' if steps == 1 else f'{steps} steps'}"
        if is_first:
            self._say(f"warning: {failure}; earlier checkpoints are untouched{again}")
