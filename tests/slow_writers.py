"""Writer processes of background saves (`background_writer.ENTRY`) that are slow, or die."""

import os
import signal
import time

from megatron_lrc.checkpoints import background_writer

_write = background_writer.write_files
_start_process = background_writer.BackgroundWriter._start_process


def use(entry: str) -> None:
    """From now on writers of this process run a function of this module; all are ready when they have been started."""
    background_writer.ENTRY = entry

    def start_and_wait(writer: background_writer.BackgroundWriter) -> None:
        _start_process(writer)
        assert writer._connection.poll(60)

    background_writer.BackgroundWriter._start_process = start_and_wait  # type: ignore[method-assign]


def serve_slowly(*arguments: int) -> None:
    """Begins to write only after the next steps have changed what it is to write."""

    def wait_and_write(buckets: list) -> object:
        time.sleep(0.7)
        return _write(buckets)

    background_writer.write_files = wait_and_write  # type: ignore[assignment]
    background_writer.serve(*arguments)


def serve_after_a_minute(*arguments: int) -> None:
    """As if torch took as long to load."""
    time.sleep(60)
    background_writer.serve(*arguments)


def serve_and_die_at_step_2(*arguments: int) -> None:
    """While it writes, as if for want of memory."""

    def write_unless_step_2(buckets: list) -> object:
        written = _write(buckets)
        if any("iter_0000002" in path for path, _, _ in buckets):
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    background_writer.write_files = write_unless_step_2  # type: ignore[assignment]
    background_writer.serve(*arguments)
