"""Builds the index maps of a run's data before it starts, on any machine.

    megatron-lrc index-cache --config run.yaml --global-batch-size 1024

takes the flags of `megatron-lrc train` (those that say nothing of data are ignored; --load says where a
resumed run stands) and prints where the maps are, the samples of each dataset and the epochs. Needs neither a
GPU nor the teacher.
"""

from collections.abc import Sequence

from megatron_lrc.config import ConfigError, parse_config
from megatron_lrc.console import say

INTERRUPTED = "interrupted; no maps were left behind"
PURPOSE = "Build the index maps of a run's data before it starts. Takes the run's flags."


def run(argv: Sequence[str], program: str) -> int:
    usage = f"{program} [--config FILE] --data-path PREFIX --global-batch-size N [FLAGS]"
    config = parse_config(argv, (usage, PURPOSE))

    from megatron_lrc.data.index_cache import build_index_cache  # imports torch, so --help comes first

    place = {}
    if config.checkpoint.load:
        from megatron_lrc.checkpoints.run_directory import AUTO, checkpoints_to_load, read_state

        found = checkpoints_to_load(config.checkpoint)
        if not found and config.checkpoint.load != AUTO:
            raise ConfigError(
                f"--load {config.checkpoint.load} holds no complete checkpoint. Leave it out for a run that starts."
            )
        if found:
            state = read_state(found[0])[0]
            place = {"step": state.step, "consumed_samples": state.consumed_samples, "consumed_tokens": state.tokens}
    build_index_cache(config, **place, report=say)
    return 0
