"""Memory that ran out, in a sentence that says when and where it did, and which flags of this run would take less."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import megatron_lrc
from megatron_lrc.config import Config, RunFailed, RunStopped
from megatron_lrc.memory_errors import cause_of, is_out_of_memory

_ROOT = Path(megatron_lrc.__file__).parent


@contextmanager
def told_in_a_sentence(config: Config, steps: Callable[[], tuple[int, int] | None]) -> Iterator[None]:
    """Where the block runs out of memory: RunStopped if no step has been taken, so that another start would end alike,
    else RunFailed.

    config: resolved. steps: the step that the start began at, and the last one; None while the models are built.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        done = steps()
        when = "while the models were built" if done is None else f"after step {done[1]:,} of {config.train_iters:,}"
        comes_again = done is None or done[0] == done[1]
        raise (RunStopped if comes_again else RunFailed)(describe(error, config, when)) from error


def describe(error: BaseException, config: Config, when: str) -> str:
    takes_less = list(_what_takes_less(config))
    return (
        f"The memory ran out {when}, in {_place(error)} ({cause_of(error)}). Take {', '.join(takes_less[:-1])} or "
        f"{takes_less[-1]}; tools/plan.py lists what fits, and --dry-run has the estimate of this run by part."
    )


def _what_takes_less(config: Config) -> Iterator[str]:
    training, parallel = config.training, config.parallel
    if training.micro_batch_size > 1:
        yield f"a smaller --micro-batch-size (it is {training.micro_batch_size})"
    if parallel.recompute_granularity != "full":
        yield "--recompute-granularity full"
    if not parallel.use_distributed_optimizer:
        yield "--use-distributed-optimizer"
    yield f"more --tensor-model-parallel-size (it is {parallel.tensor_model_parallel_size})"
    yield f"more --pipeline-model-parallel-size (it is {parallel.pipeline_model_parallel_size})"


def _place(error: BaseException) -> str:
    """The innermost line of this package that asked for the memory."""
    files = ((Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__))
    ours = [(file, line) for file, line in files if file.is_relative_to(_ROOT) and file != Path(__file__)]
    return f"{ours[-1][0].relative_to(_ROOT)}:{ours[-1][1]}" if ours else "another library"
