"""The flags that act on the end-of-document token: has the tokenizer one, and does the data hold any?"""

import logging
from collections.abc import Mapping
from typing import Any

from megatron_lrc.config import Config, ConfigError, flag_of

logger = logging.getLogger(__name__)

_SETTINGS = ("eod_mask_loss", "reset_attention_mask", "reset_position_ids")
_WAYS_TO_WRITE_IT = ("append_eod", "eos_before_bos_after", "chat_template")


def flags_that_need_eod(config: Config) -> list[str]:
    """Those of the flags that are given."""
    return [flag_of(name) for name in _SETTINGS if getattr(config.data, name)]


def check_eod(config: Config, eod: int | None, tokenizer: str, manifests: Mapping[str, dict[str, Any] | None]) -> None:
    """Raises a ConfigError if the flags need an end-of-document token and there is none; warns of data without it.

    tokenizer: how messages name it. manifests: by dataset prefix, None for a dataset that has none.
    """
    flags = flags_that_need_eod(config)
    if not flags:
        return
    if eod is None:
        raise ConfigError(
            f"{flags[0]} needs an end-of-document token, but the tokenizer of {tokenizer} has no EOS token."
        )
    for prefix, manifest in manifests.items():
        options = manifest and manifest.get("options")  # None in a merged dataset whose parts differ in them
        if options and not any(options.get(way) for way in _WAYS_TO_WRITE_IT):
            logger.warning(
                "%s was written without --append-eod: %s will find no end of a document there, unless the text itself "
                "holds the tokenizer's EOS token.",
                prefix,
                " and ".join(flags),
            )
