"""What a run's flags make of a published preset: another budget, another batch; and what another batch does to steps.

The published learning rates belong to the published batches. How a rate might follow the batch is a rule of its own
(`rates.py`, --lr auto), which is not applied to what was published.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .budget import budgets_of, count_steps, describe_budgets, is_counted
from .config import Config
from .counts import short_count
from .presets import published_among


def describe_departures(config: Config, presets: Sequence[str]) -> Iterator[str]:
    """A sentence for the budget and one for the batch, where they are not the preset's.

    config: resolved, its budget counted in steps. presets: the names given with --preset.
    """
    if (published := published_among(presets)) is None:
        return
    name, values = published
    training = config.training
    assert training.global_batch_size is not None, "the configuration has been resolved"
    tokens, published_tokens = short_count(_tokens_of(config)), short_count(values["train_tokens"])
    if tokens != published_tokens:
        budget = budgets_of(replace(training, train_iters=None) if is_counted(training) else training)
        much = "" if training.train_tokens else f" is {tokens} tokens"
        yield f"{describe_budgets(budget)}{much}; --preset {name} trains {published_tokens}"
    if training.global_batch_size != values["global_batch_size"]:
        yield (
            f"--global-batch-size {training.global_batch_size} where {name} has {values['global_batch_size']}"
            f"{_steps_instead(config, values['global_batch_size'])}{_rate_of(config, presets)}"
        )


def _tokens_of(config: Config) -> int:
    """The whole budget; of steps and epochs as if no other batch had come before."""
    training = config.training
    if training.train_tokens is not None:
        return training.train_tokens
    if training.train_samples is not None:
        return training.train_samples * training.seq_length
    assert training.global_batch_size is not None, "the configuration has been resolved"
    return config.train_iters * training.global_batch_size * training.seq_length


def propose_batches(config: Config, batch_size: int, step: int, presets: Sequence[str] = ()) -> str:
    """The multiples of `step` around a batch size that does not fit, as flags, and what they do to the run."""
    below, above = batch_size // step * step, -(-batch_size // step) * step
    sizes = [size for size in (below, above) if size]
    run = replace(config, training=replace(config.training, global_batch_size=batch_size))
    each = [f"{size}{_in_brackets(run, size)}" for size in sizes]
    now = _in_brackets(run, batch_size).strip(" ()")
    return (
        f"Use --global-batch-size {' or '.join(each)}{f', instead of {now}' if now else ''}{_rate_of(config, presets)}"
    )


def _in_brackets(config: Config, batch_size: int) -> str:
    """What a batch makes of the budget: steps, or with --train-iters tokens."""
    training = replace(config.training, global_batch_size=batch_size)
    if (steps := count_steps(training)) is not None:
        return f" ({steps:,} steps)"
    if training.train_iters:
        return f" ({short_count(training.train_iters * batch_size * training.seq_length)} tokens)"
    return ""


def _steps_instead(config: Config, batch_size: int) -> str:
    """batch_size: the other one."""
    steps = count_steps(replace(config.training, global_batch_size=batch_size))
    return "" if steps is None else f": {config.train_iters:,} steps instead of {steps:,}"


def _rate_of(config: Config, presets: Sequence[str]) -> str:
    """The end of a sentence, where the learning rate is still the preset's."""
    published = published_among(presets)
    if published is None or config.optimizer.lr != published[1]["lr"]:
        return ""
    name, values = published
    return f"; the --lr {config.peak_lr:g} of {name} was published for a batch of {values['global_batch_size']}"
