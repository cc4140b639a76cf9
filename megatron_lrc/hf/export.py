"""Student -> plain Hugging Face directory: config, weights, tokenizer, model card, and a self-check.

Each weight goes to disk before the next one is asked for: of a clone (`student_weights.py`) memory holds one
teacher matrix, its projection and the result. Everything is written into a hidden directory beside the
output, verified with plain transformers, and renamed at the end: the output is complete or absent.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_lrc.config import ConfigError, ModelShape
from megatron_lrc.hf.comparison import find_difference
from megatron_lrc.hf.exported_tokenizer import find_fault, write_tokenizer
from megatron_lrc.hf.families import TeacherDescription, Weight, by_tensor, expected_weights, tensor_shape
from megatron_lrc.hf.forward import HuggingFaceModel, fixed_tokens
from megatron_lrc.hf.narrowing import is_finite, narrowed
from megatron_lrc.hf.output_folder import complete_or_absent, write_manifest
from megatron_lrc.hf.safetensors_writer import write_model
from megatron_lrc.hf.student_config import Arch, student_config, student_family


class Source(Protocol):
    """Takes weights by our names in the order of the forward pass; then has the logits of `fixed_tokens`, in fp32.

    `mcore.layer_by_layer.LayerByLayer` is one.
    """

    def add(self, key: str, weight: Tensor) -> None: ...

    @property
    def logits(self) -> Tensor: ...


def export_model(
    *,
    base: TeacherDescription,
    shape: ModelShape,
    weight_of: Callable[[Weight], Tensor],
    dtype: torch.dtype,
    output: Path,
    arch: Arch = "auto",
    model_card: str | None = None,
    max_shard_size: int = 5 * 10**9,
    force: bool = False,
    verify: bool = True,
    source: Source | None = None,
    data_fingerprint: str = "",
    write_extra: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a model of this shape that has `base`'s config.json in everything else, and its tokenizer.

    weight_of: asked once for each weight, in the order of the forward pass; what it gives is written in
    `dtype`, and refused (ConfigError) where that makes a value infinite. max_shard_size in bytes. source: another
    engine, which gets each weight as it is written and with whose logits the result is verified. data_fingerprint:
    of the tokenizer that made the training data, if that is known. write_extra: what else belongs into the folder.
    """
    with complete_or_absent(output, source=base.directory, force=force) as partial:
        family = student_family(base, shape.hidden_size, arch, num_heads=shape.num_attention_heads)
        weights = by_tensor(expected_weights(family, shape))
        config = json.dumps(student_config(base, shape, family, dtype=dtype), indent=2, sort_keys=True)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
        write_tokenizer(base.directory, partial)
        if verify and (fault := find_fault(partial, base.directory, data_fingerprint)):  # before hours of writing
            raise ConfigError(_failed(fault))

        def tensor_of(name: str) -> Tensor:
            parts = [written_of(weight) for weight in weights[name]]
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        def written_of(weight: Weight) -> Tensor:
            name = weight.name
            written = narrowed(weight_of(weight), dtype, name)
            if verify and not is_finite(written):  # `fixed_tokens` may not come by the row that it is in
                raise ConfigError(_failed(f"{name} holds values that are not finite, so the run has diverged"))
            if source is not None and verify:
                source.add(weight.key, written)
            return written

        write_model(
            partial,
            {name: tensor_shape(parts) for name, parts in weights.items()},
            dtype=dtype,
            tensor_of=tensor_of,
            max_shard_size=max_shard_size,
        )
        write_extra(partial)
        if model_card is not None:
            (partial / "README.md").write_text(model_card, encoding="utf-8")
        if verify:
            check_export(partial, base, source)
        write_manifest(partial)


def check_export(directory: Path, teacher: TeacherDescription, source: Source | None = None) -> None:
    """Open what was written with plain transformers: every key in its place, finite logits, those of the
    source (their largest difference is printed)."""
    try:
        reason = _find_fault(directory, teacher, source)
    except ConfigError as error:
        raise ConfigError(_failed(str(error).removesuffix("."))) from error
    except Exception as error:  # whatever transformers raises, the export is not one that a user can load
        raise ConfigError(_failed(f"{type(error).__name__}: {' '.join(str(error).split())}")) from error
    if reason is not None:
        raise ConfigError(_failed(reason))


def _find_fault(directory: Path, teacher: TeacherDescription, source: Source | None) -> str | None:
    tokens = fixed_tokens(teacher.shape.vocab_size)
    model = HuggingFaceModel(directory)
    logits = model.logits(tokens)
    if not bool(logits.isfinite().all()):
        return "its logits are not finite, so the run has diverged or --dtype is too narrow"
    if model.weights_dtype == torch.float16:  # whoever loads it computes in float16, beyond 65504 in infinities
        narrow = HuggingFaceModel(directory).logits(tokens, torch.float16)
        if not bool(narrow.isfinite().all()):
            return "computed in float16 its logits are not finite, so --dtype float16 is too narrow for its activations"
    if source is not None and (difference := find_difference(directory, source.logits, logits)) is not None:
        return f"its logits are not those of the student in megatron-core: {difference}"
    return None


def _failed(reason: str) -> str:
    return f"The exported student fails its self-check: {reason}. Nothing was kept. --no-verify writes it all the same."
