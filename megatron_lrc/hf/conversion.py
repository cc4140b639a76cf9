"""Hugging Face weights -> the boxes of a megatron-core checkpoint; and the proof that a conversion lost nothing."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_lrc.checkpoints.layout import SITES, Box, key_of
from megatron_lrc.clone.sites import HeadLayout, select
from megatron_lrc.config import CONVERTED, ConfigError
from megatron_lrc.hf.checkpoint_reader import CheckpointReader, Record
from megatron_lrc.hf.families import TeacherDescription, Weight, describe_teacher, expected_weights
from megatron_lrc.hf.narrowing import narrowed
from megatron_lrc.hf.output_folder import COPIED_FILES, copy_files
from megatron_lrc.hf.reader import Reader
from megatron_lrc.hf.teacher import TeacherReader
from megatron_lrc.hf.teacher_checks import CHECKPOINT_FOLDER
from megatron_lrc.hf.teacher_identity import read_everything, warn_of_suspicious

_TRACKER_FILE = "latest_checkpointed_iteration.txt"  # Megatron-LM's pointer to the checkpoint in a directory


def stored_dtypes(reader: TeacherReader, dtype: torch.dtype | None = None) -> dict[str, torch.dtype]:
    """Key -> data type to store: `dtype`, or the narrowest that holds every tensor stored under this key exactly."""
    dtypes: dict[str, torch.dtype] = {}
    for weight in _stored_weights(reader.description):
        key, own = key_of(weight.local_name), dtype or reader.dtype(weight.key)
        dtypes[key] = torch.promote_types(dtypes.get(key, own), own)
    return dtypes


def fill_box(box: Box, reader: Reader, dtype: torch.dtype) -> Tensor:
    """What lies in a box, [*box.local_shape] in `dtype`, from the teacher's own tensors.

    ConfigError where a value would become infinite in `dtype`.
    """
    filled, heads = torch.empty(box.local_shape, dtype=dtype), HeadLayout.of(reader.description.shape)
    for name in box.names:
        place = filled
        if len(box.names) > 1:
            place = select(SITES[name.removesuffix("_bias")], filled, heads)
        tensor = reader.tensor(name, box.layer, tp_rank=box.part, tp_size=box.parts).view(place.shape)
        place.copy_(narrowed(tensor, dtype, name if box.layer is None else f"layers.{box.layer}.{name}"))
    return filled


def finish(directory: Path, reader: TeacherReader, dtypes: Mapping[str, torch.dtype]) -> None:
    """Everything beside the checkpoint: config, tokenizer, and what tells the teacher from others."""
    description = reader.description
    copy_files(description.directory, directory, [*COPIED_FILES, "config.json"])
    (directory / _TRACKER_FILE).write_text(CHECKPOINT_FOLDER + "\n")
    contents, suffix = read_everything(reader), ""
    if rounded := {str(dtype) for key, dtype in dtypes.items() if _is_rounded(reader, key, dtype)}:
        suffix = "-" + "-".join(sorted(rounded)).replace("torch.", "")
    for line in warn_of_suspicious(reader, contents):
        print(f"warning: {line}", file=sys.stderr)
    record = Record.of(
        directory / CHECKPOINT_FOLDER,
        fingerprint=reader.fingerprint(contents) + suffix,
        config_values=description.config_values,
        sampled_fingerprint=reader.sampled_fingerprint() + suffix,
        suspicious=reader.suspicious(contents),
    )
    record.write(directory)


def compare(directory: Path, reader: TeacherReader) -> tuple[int, int]:
    """Read every tensor back and compare it with its source, bit for bit: (tensors, parameters), or a ConfigError."""
    written = CheckpointReader(describe_teacher(directory, role=CONVERTED))
    tensors = parameters = 0
    for weight in _stored_weights(reader.description):
        found = written.weight(weight)
        expected = reader.weight(weight).to(found.dtype)
        if found.shape != expected.shape or not torch.equal(_bits(found), _bits(expected)):
            raise ConfigError(
                f"{weight.name} reads back otherwise than it was written; nothing was kept. Check the disk, "
                "then try again."
            )
        tensors, parameters = tensors + 1, parameters + found.numel()
    return tensors, parameters


def _stored_weights(description: TeacherDescription) -> Iterator[Weight]:
    """All but those that have to be zero: a GPTModel has no place for them."""
    return (weight for weight in expected_weights(description.family, description.shape) if not weight.is_zero)


def _is_rounded(reader: TeacherReader, key: str, dtype: torch.dtype) -> bool:
    """Whether a tensor under this key loses digits in `dtype`."""
    weights = (weight for weight in _stored_weights(reader.description) if key_of(weight.local_name) == key)
    return any(torch.promote_types(reader.dtype(weight.key), dtype) != dtype for weight in weights)


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes: NaN equals itself, and -0 is not 0."""
    return tensor.contiguous().view(torch.uint8)
