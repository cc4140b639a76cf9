"""What a process asks of the kernel about the one that started it."""

import contextlib
import ctypes

_PR_SET_PDEATHSIG = 1


def end_with_parent(signal: int) -> None:
    """Have this process get `signal` when the one that started it ends, however that ends. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal)
