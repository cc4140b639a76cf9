"""`--lr auto` of a run that starts, or of one that goes on: its number, and why."""

from dataclasses import replace

from megatron_lrc.config import Config, ConfigError, describe_rate, start_of


def with_number(config: Config, world_size: int) -> tuple[Config, str | None]:
    """A copy whose rate is a number, and a line about it; the same and None where the flags give one.

    A run that goes on keeps the rates that it was trained with, whatever its batch is now, for otherwise they would
    jump; from a checkpoint without a step the rule decides.
    """
    if config.optimizer.lr is not None:
        return config, None
    if (before := _trained_with(config)) is not None:
        optimizer = replace(config.optimizer, lr=before.optimizer.lr)
        projection = replace(config.projection, open_lr=config.projection.open_lr or before.projection.open_lr)
        kept = replace(config, optimizer=optimizer, projection=projection)
        return kept, f"--lr auto: {optimizer.lr:g}, as before"
    chosen = config.resolved(world_size)
    optimizer, projection = chosen.optimizer, chosen.projection
    batch_tokens = config.batch_tokens(world_size)
    line = f"--lr auto: {describe_rate(start_of(projection), batch_tokens)}"
    if projection.open_lr is not None and config.projection.open_lr is None:
        line += f"; then {describe_rate('opened', batch_tokens)}"
    return replace(config, optimizer=optimizer, projection=projection), line


def _trained_with(config: Config) -> Config | None:
    """The configuration of the checkpoint that --load means, if a step has been taken. A damaged one is passed over
    here as it will be later."""
    if not config.checkpoint.load:
        return None
    from megatron_lrc.checkpoints.run_directory import checkpoints_to_load, read_state  # loads torch

    for path in checkpoints_to_load(config.checkpoint):
        try:
            state, before, _ = read_state(path)
        except ConfigError:
            continue
        return before if state.step and before.optimizer.lr is not None else None
    return None
