"""Ctrl-C while there is nothing to save: the process ends at once, with a line instead of a traceback."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from megatron_lrc.console import complain


@contextlib.contextmanager
def ended_by_ctrl_c(program: str) -> Iterator[None]:
    """Have SIGINT end the process with exit code 130. In the main thread.

    A thread takes note, as in `train/stopping.py`, since Python's own handler would wait for the main thread to come
    back from libraries, which may wait for other processes for many minutes.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)  # as set_wakeup_fd demands
    thread = threading.Thread(target=_end_on_sigint, args=(read, program), name="ctrl-c", daemon=True)
    thread.start()
    wakeup_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    handler_before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a run that is saved has nothing to be asked any more
            signal.signal(signal.SIGINT, handler_before)
        signal.set_wakeup_fd(wakeup_before)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)


def _end_on_sigint(read: int, program: str) -> None:
    while number := os.read(read, 1)[0]:
        if number == signal.SIGINT:
            if os.environ.get("RANK", "0") == "0":
                complain(f"{program}: interrupted")
            os._exit(128 + number)
