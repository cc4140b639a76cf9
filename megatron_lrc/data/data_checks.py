"""Is the data of a run usable? Answered before any process group or model exists, alike on every rank.

Do the datasets that the flags name exist, whole and large enough (an empty part of --split sends
megatron-core's GPTDataset into an endless loop), and is what they hold of the teacher's vocabulary and
tokenizer?
"""

import logging

import numpy

from megatron_lrc.config import Config, ConfigError, budgets_of, describe_budgets, flag_of
from megatron_lrc.data.blends import dataset_prefixes, plan_data
from megatron_lrc.data.counted_tokens import check_masks
from megatron_lrc.data.directory_tokenizer import has_tokenizer
from megatron_lrc.data.indexed_files import IndexedFile, read_index, read_indexed_file
from megatron_lrc.data.loaded_tokenizer import Tokenizer, describe_unlike
from megatron_lrc.data.tokenizers import load_tokenizer

logger = logging.getLogger(__name__)

_SCAN_TOKENS = 1 << 24  # token ids looked at together
_NEED_EOD = ("eod_mask_loss", "reset_attention_mask", "reset_position_ids")
_WAYS_TO_WRITE_EOD = ("append_eod", "eos_before_bos_after", "chat_template")


def check_data(config: Config, teacher_vocab_size: int) -> str:
    """ConfigError unless every dataset exists, is whole, is large enough and fits the teacher's vocabulary.

    Gives the fingerprint of the tokenizer that the data is known to be of, "" where nothing says which it is. On every
    rank, so that all refuse alike: every entry of the .idx of 20 million documents takes 0.2 s.
    """
    files = check_sizes(config)
    tokenizer = _check_vocabulary(config, files, teacher_vocab_size) if files else None
    for prefix in dataset_prefixes(plan_data(config)):
        read_index(prefix, allow_empty_documents=True)
    check_masks(config)
    return tokenizer.fingerprint if tokenizer else ""


def check_sizes(config: Config) -> list[IndexedFile]:
    """The part of `check_data` that needs neither teacher nor tokenizer; gives the datasets."""
    plan, training = plan_data(config), config.training
    if plan.train is None:
        calibrations = config.calibrations if config.checkpoint.load is None else ()
        purposes = {f"{describe_budgets({name: value})}": value > 0 for name, value in budgets_of(training).items()} | {
            f"{flag} (for its calibration)": True for flag in calibrations
        }
        for purpose, is_asked in purposes.items():
            if is_asked:
                raise ConfigError(f"{purpose} needs training data. Give --data-path or --train-data-path, as a prefix.")
        return []
    files = {prefix: read_indexed_file(prefix) for prefix in dataset_prefixes(plan)}
    for blend, part, what in ((plan.train, plan.train_part, "training"), (plan.valid, plan.valid_part, "validation")):
        for prefix in blend.prefixes if blend else []:
            _check_enough(files[prefix], part, what, config)
    return list(files.values())


def _check_enough(file: IndexedFile, part: tuple[float, float], what: str, config: Config) -> None:
    """Every part drawn from must fill one sample: megatron-core repeats fewer tokens within it, and loops on none."""
    lengths = file.part(part)
    num_tokens = int(lengths.sum(dtype=numpy.int64))
    needed = config.training.seq_length + 1
    if num_tokens < needed:
        share = f" of --split {config.data.split}" if config.data.data_path else ""
        remedy = "Use more data" + (
            ", another --split, or --eval-iters 0" if what == "validation" else " or a shorter --seq-length"
        )
        raise ConfigError(
            f"The {what} part{share} of {file.prefix} has {num_tokens} tokens ({len(lengths)} of "
            f"{len(file.lengths)} documents); one sample takes {needed} (--seq-length "
            f"{config.training.seq_length}, and one for the last label). {remedy}."
        )


def _check_vocabulary(config: Config, files: list[IndexedFile], teacher_vocab_size: int) -> Tokenizer | None:
    """Datasets with a manifest: same tokenizer as the run's, which is given. Without: every token id is looked at."""
    for file in files:
        if file.manifest is None:
            logger.warning(
                "%s.json does not exist: which tokenizer made this dataset is not known, so only the range "
                "of its token ids is checked.",
                file.prefix,
            )
            _check_token_ids(file, teacher_vocab_size, config.base_role.noun)
    has_manifest = any(file.manifest for file in files)
    if config.data.tokenizer_model is None and not flags_that_need_eod(config) and not has_manifest:
        return None
    kind = "teacher" if config.model.student is None else "student"
    flag = "--tokenizer-model" if config.data.tokenizer_model else f"--{kind}"
    path = config.data.tokenizer_model or config.base_model
    if path is None:
        raise ConfigError("The run has no tokenizer to compare the data with. Give --teacher or --tokenizer-model.")
    tokenizer = _load_base_tokenizer(config, load_tokenizer(path), f"{flag} {path}")
    if tokenizer.vocab_size > teacher_vocab_size:
        _check_ids_beyond(config, tokenizer, teacher_vocab_size, f"{flag} {path}", files)
    check_eod(config, tokenizer.eod, f"{flag} {path}", files)
    for file in files:
        if file.manifest and not tokenizer.made(file.manifest["tokenizer"]):
            raise ConfigError(
                f"{file.prefix} was made with the tokenizer {describe_unlike(file.manifest['tokenizer'])}, but the "
                f"run's is that of {flag} {path} ({tokenizer.vocab_size} ids, fingerprint "
                f"{tokenizer.fingerprint[:12]}). Write the data again with tools/preprocess_data.py "
                f"--tokenizer-model {path}."
            )
    return tokenizer if has_manifest else None


def _check_ids_beyond(
    config: Config, tokenizer: Tokenizer, vocab_size: int, where: str, files: list[IndexedFile]
) -> None:
    """The tokenizer has ids that the embedding has no row for: padding, in teachers of which it is the own tokenizer
    (transformers #24899). That does no harm unless the data holds one, which only its tokens show."""
    noun, base = config.base_role.noun, config.base_model
    if base is None or not has_tokenizer(base):
        raise ConfigError(
            f"The tokenizer of {where} has {tokenizer.vocab_size} token ids, but the {noun} {base} has {vocab_size}. "
            f"Use the {noun}'s own tokenizer with --tokenizer-model."
        )
    if flags_that_need_eod(config) and tokenizer.eod is not None and tokenizer.eod >= vocab_size:
        raise ConfigError(
            f"{flags_that_need_eod(config)[0]} needs the end-of-document token {tokenizer.eod}, but the {noun}'s "
            f"embedding has {vocab_size} rows: it cannot be in the data. Leave the flag out."
        )
    for file in files:
        if file.manifest:  # the others have been looked at
            _check_token_ids(file, vocab_size, noun)


def _load_base_tokenizer(config: Config, tokenizer: Tokenizer, where: str) -> Tokenizer:
    """The one of the teacher's own directory, which --tokenizer-model must agree with; the given one if it has none."""
    base = config.base_model
    if config.data.tokenizer_model is None or base is None or not has_tokenizer(base):
        return tokenizer
    own = load_tokenizer(base)
    if not own.made(tokenizer.as_manifest()):
        raise ConfigError(
            f"{where} is not the tokenizer of the {config.base_role.noun} {base}: "
            f"{own.difference_from(tokenizer)}. Leave out --tokenizer-model, and write the data with the "
            f"{config.base_role.noun}'s own."
        )
    return own


def _check_token_ids(file: IndexedFile, vocab_size: int, noun: str) -> None:
    tokens = file.tokens
    for start in range(0, len(tokens), _SCAN_TOKENS):
        piece = tokens[start : start + _SCAN_TOKENS]
        lowest, highest = int(piece.min()), int(piece.max())
        if lowest < 0 or highest >= vocab_size:
            raise ConfigError(
                f"{file.prefix}.bin holds token id {highest if highest >= vocab_size else lowest}, but the "
                f"{noun}'s ids are 0 to {vocab_size - 1}: another tokenizer made it, or the text names a token "
                f"that the {noun} has no row for. Write the data again with the {noun}'s tokenizer, or without it."
            )


def flags_that_need_eod(config: Config) -> list[str]:
    """Those flags that act on the end-of-document token and are given."""
    return [flag_of(name) for name in _NEED_EOD if getattr(config.data, name)]


def check_eod(config: Config, eod: int | None, tokenizer: str, files: list[IndexedFile]) -> None:
    """ConfigError if the flags need an end-of-document token and there is none; warns of data without it.

    tokenizer: how messages name it.
    """
    flags = flags_that_need_eod(config)
    if not flags:
        return
    if eod is None:
        raise ConfigError(
            f"{flags[0]} needs an end-of-document token, but the tokenizer of {tokenizer} has no EOS token."
        )
    for file in files:
        options = file.manifest and file.manifest.get("options")  # None in a merged dataset whose parts differ in them
        if options and not any(options.get(way) for way in _WAYS_TO_WRITE_EOD):
            logger.warning(
                "%s was written without --append-eod: %s will find no end of a document there, unless the "
                "text itself holds the tokenizer's EOS token.",
                file.prefix,
                " and ".join(flags),
            )
