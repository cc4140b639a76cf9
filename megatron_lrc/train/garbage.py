"""Python's garbage collection while steps run: by the loop, after the same steps on every rank.

Left to itself Python collects when so many objects have been made, on each rank at another time, and every other rank
waits for that one. And it looks at everything there is: torch, megatron-core and the run, which are no garbage.
"""

import contextlib
import gc
import os
from collections.abc import Iterator

#: Steps between collections. What waits for them are only objects in reference cycles; a step leaves no tensor in one.
STEPS = 100


@contextlib.contextmanager
def collected_by_the_loop() -> Iterator[None]:
    """Within the block Python collects nothing by itself, and `collect_after` only what was made in it."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def collect_after(step: int) -> None:
    if step % STEPS == 0:
        gc.collect()


def collect_everything() -> None:
    """Collect at once, also what `collected_by_the_loop` leaves out. For when something as large as an
    optimizer has been replaced: it is held by nothing but itself, and a GPU's memory cannot wait for the next
    collection."""
    was_left_out = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if was_left_out:
        gc.freeze()


# A forked process (one that reads data) has no loop that would collect.
os.register_at_fork(after_in_child=gc.enable)
