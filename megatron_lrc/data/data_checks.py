"""Is the data of a run usable? Answered before any process group or model exists, alike on every rank.

Reads the .idx header and sizes itself: megatron-core answers a bad file with an assertion or reads past its end, and an
empty part of --split sends its GPTDataset into an endless loop.

    .idx   9 bytes b"MMIDIDX\\0\\0" | version u64 = 1 | dtype code u8 | sequences u64 | documents + 1 u64
           | length of each sequence i32 | its byte offset in the .bin i64 | first sequence of each document i64
    .bin   all token ids end to end
"""

import json
import logging
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy

from megatron_lrc.config import Config, ConfigError
from megatron_lrc.data.eod_checks import check_eod, flags_that_need_eod
from megatron_lrc.data.loaded_tokenizer import TokenizerIdentity
from megatron_lrc.data.tokenizers import load_tokenizer

logger = logging.getLogger(__name__)

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
TOKEN_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_SCAN_TOKENS = 1 << 24  # token ids looked at together


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Dataset prefixes and their weights, as one flag gives them. No weights: in proportion to the tokens."""

    flag: str
    prefixes: list[str]
    weights: list[float] | None


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """What training and validation draw from: each blend (None: no such data), the part (from, to) of its documents."""

    train: Blend | None
    valid: Blend | None
    train_part: tuple[float, float] = (0.0, 1.0)
    valid_part: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class IndexedFile:
    """What the .idx of one dataset says."""

    prefix: str
    dtype: numpy.dtype
    lengths: numpy.ndarray  # tokens of each sequence, memory-mapped
    manifest: dict[str, Any] | None

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=numpy.int64))

    def documents(self, bounds: tuple[float, float]) -> range:
        """The documents of a part, cut where megatron-core's BlendedMegatronDatasetBuilder cuts."""
        return range(*(int(round(bound * float(len(self.lengths)))) for bound in bounds))

    def part(self, bounds: tuple[float, float]) -> numpy.ndarray:
        """The lengths within a part."""
        documents = self.documents(bounds)
        return self.lengths[documents.start : documents.stop]


def check_data(config: Config, teacher_vocab_size: int) -> None:
    """Raises a ConfigError unless every dataset exists, is whole, is large enough and fits the teacher's vocabulary."""
    files = check_sizes(config)
    if files:
        _check_vocabulary(config, files, teacher_vocab_size)


def check_sizes(config: Config) -> list[IndexedFile]:
    """The part of `check_data` that needs neither teacher nor tokenizer; gives the datasets."""
    plan, training = plan_data(config), config.training
    if plan.train is None:
        for purpose, is_asked in (
            ("--train-iters above 0", training.train_iters > 0),
            ("--train-epochs above 0", training.train_epochs > 0),
            (
                f"--init {config.projection.init} (for its calibration)",
                config.projection.is_calibrated and config.checkpoint.load is None,
            ),
        ):
            if is_asked:
                raise ConfigError(f"{purpose} needs training data. Give --data-path or --train-data-path, as a prefix.")
        return []
    files = {prefix: read_indexed_file(prefix) for prefix in dataset_prefixes(plan)}
    for blend, part, what in ((plan.train, plan.train_part, "training"), (plan.valid, plan.valid_part, "validation")):
        for prefix in blend.prefixes if blend else []:
            _check_enough(files[prefix], part, what, config)
    return list(files.values())


def plan_data(config: Config) -> DataPlan:
    """The blends and parts that the data flags ask for. No validation with --eval-iters 0 or an empty second part."""
    data, wants_valid = config.data, config.logging.eval_iters > 0
    if data.data_path and (data.train_data_path or data.valid_data_path):
        raise ConfigError(
            "--data-path is divided by --split and excludes --train-data-path and --valid-data-path. Give one or the "
            "other."
        )
    if not data.data_path:
        if data.valid_data_path and not data.train_data_path:
            raise ConfigError("--valid-data-path stands beside --train-data-path, which is missing. Give both.")
        valid = _read_blend("--valid-data-path", data.valid_data_path) if wants_valid else None
        return DataPlan(train=_read_blend("--train-data-path", data.train_data_path), valid=valid)
    blend = _read_blend("--data-path", data.data_path)
    train_part, valid_part = _read_split(data.split)
    has_valid = wants_valid and valid_part[1] > valid_part[0]
    return DataPlan(train=blend, valid=blend if has_valid else None, train_part=train_part, valid_part=valid_part)


def read_indexed_file(prefix: str) -> IndexedFile:
    """Reads the .idx (lengths memory-mapped) and compares the sizes of both files with it."""
    idx_path, bin_path = f"{prefix}.idx", f"{prefix}.bin"
    for path in (idx_path, bin_path):
        if not os.path.isfile(path):
            raise ConfigError(
                f"There is no {path}. A dataset is named by its prefix, PREFIX of PREFIX.bin and PREFIX.idx: correct "
                "the data path, or write the dataset with tools/preprocess_data.py."
            )
    with open(idx_path, "rb") as file:
        header = file.read(HEADER.size)
    fields = HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0, 0, 0, 0)
    magic, version, dtype_code, num_sequences, num_bounds = fields
    if magic != MAGIC or version != 1 or dtype_code not in TOKEN_DTYPES:
        raise ConfigError(
            f"{idx_path} is not an index of megatron-core's format (header {header[:9]!r}). Write it with "
            "tools/preprocess_data.py."
        )
    if num_sequences == 0:
        raise ConfigError(f"{idx_path} holds no document. Write it again from text with tools/preprocess_data.py.")
    _check_size(idx_path, HEADER.size + 12 * num_sequences + 8 * num_bounds, "its header says", may_be_longer=True)
    lengths = numpy.memmap(idx_path, dtype=numpy.int32, mode="r", offset=HEADER.size, shape=(num_sequences,))
    dtype = numpy.dtype(TOKEN_DTYPES[dtype_code])
    _check_size(bin_path, int(lengths.sum(dtype=numpy.int64)) * dtype.itemsize, f"{idx_path} says")
    return IndexedFile(prefix=prefix, dtype=dtype, lengths=lengths, manifest=_read_manifest(prefix, lengths))


def dataset_prefixes(plan: DataPlan) -> list[str]:
    """Each dataset once."""
    blends = [blend for blend in (plan.train, plan.valid) if blend]
    return list(dict.fromkeys(prefix for blend in blends for prefix in blend.prefixes))


def _read_blend(flag: str, values: list[str]) -> Blend | None:
    """[P], [P1, P2, ...] or [W1, P1, W2, P2, ...], told apart as megatron-core's get_blend_from_list does it."""
    if not values:
        return None
    numbers = [_as_number(value) for value in values[::2]]
    if len(values) % 2 or all(number is None for number in numbers):
        return Blend(flag=flag, prefixes=[os.path.abspath(value) for value in values], weights=None)
    weights = [number for number in numbers if number is not None and number > 0]
    if len(weights) < len(numbers):
        raise ConfigError(
            f"{flag} {' '.join(values)}: weights and prefixes do not alternate, or a weight is not above 0. Give "
            "prefixes only, or W1 PREFIX1 W2 PREFIX2 ... with every weight above 0."
        )
    return Blend(flag=flag, prefixes=[os.path.abspath(value) for value in values[1::2]], weights=weights)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _read_split(split: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """The training and validation parts of --split, as fractions of the documents."""
    shares = [_as_number(share) for share in split.split(",")]
    numbers = [share for share in shares if share is not None and 0 <= share < float("inf")]
    if len(numbers) != len(shares) or len(shares) > 3 or numbers[0] <= 0:
        raise ConfigError(
            f"--split {split}: expected up to three shares (training, validation, test) of 0 or more, the first above "
            "0, such as 969,30,1."
        )
    total = sum(numbers)
    train = numbers[0] / total
    valid = numbers[1] / total if len(numbers) > 1 else 0.0
    return (0.0, train), (train, train + valid)


def _check_size(path: str, expected: int, who_says: str, *, may_be_longer: bool = False) -> None:
    size = os.path.getsize(path)
    if size < expected or (size > expected and not may_be_longer):
        raise ConfigError(
            f"{path} has {size} bytes where {who_says} {expected}: it is truncated or belongs to another dataset. Copy "
            "it again, or write the dataset again with tools/preprocess_data.py."
        )


def _read_manifest(prefix: str, lengths: numpy.ndarray) -> dict[str, Any] | None:
    """The manifest beside an .idx, or None if there is no such file."""
    path = f"{prefix}.json"
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        documents, tokens = manifest["documents"], manifest["tokens"]
        identity_of(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a manifest of tools/preprocess_data.py. Move it away, or write the dataset again."
        ) from error
    found = (len(lengths), int(lengths.sum(dtype=numpy.int64)))
    if found != (documents, tokens):
        raise ConfigError(
            f"{path} describes {documents} documents with {tokens} tokens, but {prefix}.idx has {found[0]} with "
            f"{found[1]}. The files belong to different datasets: copy all three again, or write the dataset again."
        )
    return manifest


def identity_of(manifest: dict[str, Any]) -> TokenizerIdentity:
    """The tokenizer that a manifest names."""
    tokenizer = manifest["tokenizer"]
    return TokenizerIdentity(
        fingerprint=tokenizer["fingerprint"], vocab_size=tokenizer["vocab_size"], eod=tokenizer["eod"]
    )


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
            f"The {what} part{share} of {file.prefix} has {num_tokens} tokens ({len(lengths)} of {len(file.lengths)} "
            f"documents); one sample takes {needed} (--seq-length {config.training.seq_length}, and one for the last "
            f"label). {remedy}."
        )


def _check_vocabulary(config: Config, files: list[IndexedFile], teacher_vocab_size: int) -> None:
    """Datasets with a manifest: same tokenizer as the run's. Without: every token id is looked at."""
    for file in files:
        if file.manifest is None:
            logger.warning(
                "%s.json does not exist: which tokenizer made this dataset is not known, so only the range of its "
                "token ids is checked.",
                file.prefix,
            )
            _check_token_ids(file, teacher_vocab_size)
    has_manifest = any(file.manifest for file in files)
    if config.data.tokenizer_model is None and not flags_that_need_eod(config) and not has_manifest:
        return
    kind = "teacher" if config.model.student is None else "student"
    flag = "--tokenizer-model" if config.data.tokenizer_model else f"--{kind}"
    path = config.data.tokenizer_model or config.base_model
    if path is None:
        raise ConfigError("The run has no tokenizer to compare the data with. Give --teacher or --tokenizer-model.")
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > teacher_vocab_size:
        raise ConfigError(
            f"The tokenizer of {flag} {path} has {tokenizer.vocab_size} token ids, but the {kind} {config.base_model} "
            f"has {teacher_vocab_size}. Use the {kind}'s own tokenizer with --tokenizer-model."
        )
    check_eod(config, tokenizer.eod, f"{flag} {path}", {file.prefix: file.manifest for file in files})
    for file in files:
        if file.manifest and file.manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
            made_with = file.manifest["tokenizer"]
            raise ConfigError(
                f"{file.prefix} was made with the tokenizer {made_with.get('model')} ({made_with['vocab_size']} ids, "
                f"fingerprint {made_with['fingerprint'][:12]}), but the run's is that of {flag} {path} "
                f"({tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:12]}). Write the data again with "
                f"tools/preprocess_data.py --tokenizer-model {path}."
            )


def _check_token_ids(file: IndexedFile, teacher_vocab_size: int) -> None:
    tokens = numpy.memmap(f"{file.prefix}.bin", dtype=file.dtype, mode="r")
    for start in range(0, len(tokens), _SCAN_TOKENS):
        piece = tokens[start : start + _SCAN_TOKENS]
        lowest, highest = int(piece.min()), int(piece.max())
        if lowest < 0 or highest >= teacher_vocab_size:
            raise ConfigError(
                f"{file.prefix}.bin holds token id {highest if highest >= teacher_vocab_size else lowest}, but the "
                f"teacher's ids are 0 to {teacher_vocab_size - 1}: another tokenizer made it. Write the data again "
                "with the teacher's."
            )
