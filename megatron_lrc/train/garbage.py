"""Python's garbage collection while steps run."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collect_only_new_objects(*, is_on: bool) -> Iterator[None]:
    """Within the block, Python's collections look only at objects that were made in it; for background saves.

    A background save makes many objects and so sets off a collection of everything, which holds up the loop longer than
    the save does. The objects from before, those of torch, of megatron-core and of the run, are no garbage.
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


def collect_everything() -> None:
    """Collect at once, also what `collect_only_new_objects` leaves out. For when something as large as an
    optimizer has been replaced: it is held by nothing but itself, and a GPU's memory cannot wait for the next
    collection."""
    was_left_out = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if was_left_out:
        gc.freeze()
