"""A start of several ranks: what each would refuse alone, then whether all are alike. Before any collective."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType

from megatron_lrc.config import Config
from megatron_lrc.hf.reader import Contents
from megatron_lrc.hf.shared_hash import Sharers
from megatron_lrc.launch.agreement import Agreement
from megatron_lrc.locks import FileLock, lock_of_run
from megatron_lrc.mcore.distributed import Meeting
from megatron_lrc.train.rank_identity import describe_device, describe_rank
from megatron_lrc.train.start_checks import Checked, check_base, check_start, read_base, with_contents


@contextmanager
def open_lock(config: Config) -> Iterator[FileLock | None]:
    """RUN/.lock, which rank 0 takes in `check_alike` and which ends with this; None without --save."""
    if not config.checkpoint.save:
        yield None
        return
    lock = lock_of_run(Path(config.checkpoint.save))
    try:
        yield lock
    finally:
        lock.release()


def check_alike(
    config: Config,
    meeting: Meeting,
    lock: FileLock | None = None,
    damaged: Mapping[Path, str] = MappingProxyType({}),
    contents: Contents | None = None,
) -> Checked:
    """`check` on every rank of a run, all of which call this; those of a node read the teacher's files together.

    lock: of the run directory, to be held from before its checkpoints are looked at until the run has ended, or None if
    that is done. contents: those of an earlier call. ConfigError also where it fails on another rank, or the ranks
    differ in what `describe_rank` says; RanksMissing where one does not come in time.
    """
    agreement = Agreement(
        store=meeting.store,  # type: ignore[arg-type]  # torch's stubs lack has_extended_api
        rank=meeting.rank,
        world_size=meeting.world_size,
        timeout=timedelta(minutes=config.parallel.distributed_timeout_minutes),
        name=f"start-{len(damaged)}",
    )
    sharers = Sharers.of_environment(meeting.store, agreement.timeout.total_seconds())  # type: ignore[arg-type]
    try:
        if lock and meeting.rank == 0:
            lock.take()
        checked = check_start(config, meeting.world_size, damaged)
        checked = with_contents(checked, read_base(checked, sharers) if contents is None else contents)
        mine = describe_rank(checked, meeting.world_size) if meeting.world_size > 1 else {}
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        sharers.tell_failure(text)
        agreement.tell_failure(text)
        raise
    if devices := agreement.reach(mine, remark=describe_device()):
        checked.warnings.append(f"the ranks' devices differ, and all are as slow as the slowest: {devices}")
    return check_base(checked)
