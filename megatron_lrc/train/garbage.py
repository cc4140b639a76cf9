"""Python's garbage collection while steps run."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def what_is_there_stays(*, is_on: bool) -> Iterator[None]:
    """Collections look only at what has been made since; for background saves.

    A collection of everything holds up the loop longer than a background save does, and comes when one has made many
    objects. What it would go through, torch's and megatron-core's modules and a run's, is no garbage.
    """
    if not is_on:
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def collect_what_was_replaced() -> None:
    """Collect everything at once, also what was left out: something as large as an optimizer has been replaced, and is
    held by nothing but itself. A GPU's memory would not wait for the next collection."""
    was_left_out = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if was_left_out:
        gc.freeze()
