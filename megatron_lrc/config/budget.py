"""How long a run trains: in tokens, sequences, steps or passes over its data, of which it has exactly one.

Whatever the budget is, a run counts steps: `count_steps` here for tokens and sequences, `data.datasets` for passes over
the data. Where a run is continued, what it has read is taken off, whatever its batches were, so that it ends at its
budget with another batch size too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from .counts import exact_count, short_count
from .settings import TrainingConfig

#: Settings of which a run has one.
BUDGETS = ("train_tokens", "train_samples", "train_iters", "train_epochs")
#: Those that may be written as 10B.
SUFFIXED = BUDGETS[:2]


def budgets_in(values: Mapping[str, Any]) -> dict[str, int]:
    """The budgets among some settings. `train_iters: 0` beside epochs is how older files say that there are epochs."""
    given = {name: values[name] for name in BUDGETS if values.get(name) is not None}
    if not given.get("train_epochs"):
        given.pop("train_epochs", None)
    elif given.get("train_iters") == 0:
        del given["train_iters"]
    return given


def budgets_of(training: TrainingConfig) -> dict[str, int]:
    """Before steps are counted: one, of a run that may start."""
    return budgets_in({name: getattr(training, name) for name in BUDGETS})


def is_counted(training: TrainingConfig) -> bool:
    """Whether steps follow from another budget."""
    return bool(training.train_epochs) or training.train_tokens is not None or training.train_samples is not None


def describe_budgets(given: Mapping[str, int]) -> str:
    """As flags: `--train-tokens 10B and --train-iters 5`."""
    texts = {name: exact_count(value) if name in SUFFIXED else str(value) for name, value in given.items()}
    return " and ".join(f"--{name.replace('_', '-')} {text}" for name, text in texts.items())


def refuse_several(given: Mapping[str, int], where: str) -> Iterator[str]:
    """where: where they stand, in front of the sentence."""
    if len(given) > 1:
        yield f"{where}{describe_budgets(given)} are given together. A run has one budget: keep one."


def check_budget(training: TrainingConfig) -> Iterator[str]:
    """Of flags, before their steps are counted: exactly one."""
    given = budgets_of(training)
    yield from refuse_several(given, "")
    if not given:
        yield (
            "How long to train is not given. Give --train-tokens (such as 10B), --train-samples, --train-iters or "
            "--train-epochs; --train-iters 0 with --save writes the untrained student."
        )


def count_steps(
    training: TrainingConfig, *, step: int = 0, consumed_samples: int = 0, consumed_tokens: int = 0
) -> int | None:
    """Steps that --train-tokens or --train-samples comes to, the fewest that reach it; None with another budget.

    training: with its global batch size. step, consumed_samples, consumed_tokens: where a continued run stands.
    """
    batch_size = training.global_batch_size
    assert batch_size is not None, "the configuration has been resolved"
    if training.train_tokens is not None:
        left, of_step = training.train_tokens - consumed_tokens, batch_size * training.seq_length
    elif training.train_samples is not None:
        left, of_step = training.train_samples - consumed_samples, batch_size
    else:
        return None
    return step + max(-(-left // of_step), 0)


def describe_training(training: TrainingConfig, *, step: int = 0, consumed_tokens: int = 0) -> str:
    """One line: the whole run's tokens and steps. training: its steps counted. step, consumed_tokens: as above."""
    assert training.train_iters is not None and training.global_batch_size is not None
    of_step = training.global_batch_size * training.seq_length
    total = consumed_tokens + (training.train_iters - step) * of_step
    return f"{short_count(total)} tokens in {training.train_iters:,} steps of {of_step:,} tokens"
