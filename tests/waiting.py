"""Waiting for what another process or thread does."""

import time
from collections.abc import Callable


def wait_until(is_true: Callable[[], bool], seconds: float = 200) -> None:
    """Fails when it is not true within these seconds."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.05)
