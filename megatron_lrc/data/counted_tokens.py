"""Which tokens of a run's data count in its losses: all, or of chats the assistant's only."""

import os

from megatron_lrc.config import Config, ConfigError
from megatron_lrc.data.blends import Blend, plan_data
from megatron_lrc.data.indexed_files import IndexedFile, read_indexed_file

ALL, ASSISTANT = "all", "assistant"  # as a checkpoint has it
_MOST_NAMED = 4  # datasets in a line


def which_tokens_count(config: Config) -> str:
    """ALL or ASSISTANT, of the training data."""
    blend = plan_data(config).train
    has_mask = blend is not None and any(read_indexed_file(prefix).mask for prefix in blend.prefixes)
    return ASSISTANT if has_mask and not config.data.train_on_inputs else ALL


def check_masks(config: Config) -> None:
    """ConfigError for a mask that is damaged or another dataset's, and for data of which no token counts."""
    plan = plan_data(config)
    checked: set[str] = set()
    for blend in (plan.train, plan.valid):
        if blend is None:
            continue
        files = [read_indexed_file(prefix) for prefix in blend.prefixes]
        for file in files:
            if file.mask and file.prefix not in checked:
                file.mask.check()
                checked.add(file.prefix)
        if not config.data.train_on_inputs and not any(map(_num_counted, files)):
            raise ConfigError(
                f"No token of {blend.flag} counts in the losses, since its chats have no answer of the assistant's. "
                "Give chats with messages of the role assistant, or --train-on-inputs."
            )


def describe_counted_tokens(config: Config) -> str | None:
    """A line for a run's start; None where no dataset says that only some of its tokens are to count."""
    plan = plan_data(config)
    blends = [plan.train, plan.valid if plan.valid is not plan.train else None]
    given = [blend for blend in blends if blend]
    if not any(read_indexed_file(prefix).mask for blend in given for prefix in blend.prefixes):
        return None
    if config.data.train_on_inputs:
        return "losses: every token counts, also those of chats that are not the assistant's (--train-on-inputs)"
    shares = " and ".join(f"{_share_of(blend):.1%} of the tokens of {blend.flag}{_each(blend)}" for blend in given)
    return f"losses: of chats the assistant's tokens count, which makes {shares}; the others are context"


def _num_counted(file: IndexedFile) -> int:
    return file.mask.num_counted if file.mask else file.num_tokens


def _share_of(blend: Blend) -> float:
    """Of the tokens that a run takes from the datasets, as if it took all of each."""
    files = [read_indexed_file(prefix) for prefix in blend.prefixes]
    weights = blend.weights or [file.num_tokens for file in files]
    shares = [_num_counted(file) / file.num_tokens for file in files]
    return sum(weight * share for weight, share in zip(weights, shares, strict=True)) / sum(weights)


def _each(blend: Blend) -> str:
    """Of a few datasets each one's share."""
    if not 1 < len(blend.prefixes) <= _MOST_NAMED:
        return ""
    files = [read_indexed_file(prefix) for prefix in blend.prefixes]
    parts = [f"{os.path.basename(file.prefix)} {_num_counted(file) / file.num_tokens:.1%}" for file in files]
    return f" ({', '.join(parts)})"
