"""Student -> plain Hugging Face directory: config, weights, tokenizer, model card, and a self-check.

`export_student` composes a clone, `export_model` writes what was trained by itself. Each weight of a clone is composed
here with `sites.compose`, in the dtype of the projections, exactly as training composes it, and goes to disk before the
next one is read: memory holds one teacher matrix, its projection and the result, whatever the model.

Everything is written into a hidden directory beside the output, verified with plain transformers, and renamed at the
end: the output is complete or absent.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import transformers
from torch import Tensor

from megatron_lrc.clone.sites import compose, projection_names
from megatron_lrc.config import ConfigError, ModelShape
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.comparison import find_difference
from megatron_lrc.hf.families import TeacherDescription, Weight, expected_weights
from megatron_lrc.hf.forward import HuggingFaceModel, fixed_tokens
from megatron_lrc.hf.output_folder import complete_or_absent, copy_files
from megatron_lrc.hf.reader import Reader
from megatron_lrc.hf.safetensors_writer import DTYPES, write_model, write_tensors
from megatron_lrc.hf.student_config import Arch, student_config, student_family

PROJECTIONS_FILE = "projections.safetensors"


_SAMPLE_TEXT = "The low-rank clone answers: 3.14 * 2 = 6.28, isn't it?\n\n  Line two."


class Source(Protocol):
    """Takes weights by our names in the order of the forward pass; then has the logits of `fixed_tokens`, in fp32.

    `mcore.layer_by_layer.LayerByLayer` is one.
    """

    def add(self, key: str, weight: Tensor) -> None: ...

    @property
    def logits(self) -> Tensor: ...


def export_student(
    *,
    teacher: TeacherDescription,
    projections: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
    student_hidden_size: int,
    output: Path,
    arch: Arch = "auto",
    dtype: torch.dtype | None = None,
    save_projections: bool = False,
    model_card: str | None = None,
    max_shard_size: int = 5 * 10**9,
    force: bool = False,
    verify: bool = True,
    source: Source | None = None,
) -> None:
    """Write the student that these projections and norm gains make of this teacher.

    projections: `embed`, `lm_head` (absent when tied), `layers.{i}.{q,k,v,o,gate,up,down}`, each a full (D, d) matrix.
    norms: `layers.{i}.input`, `layers.{i}.post`, `final`, each (d,). Both may be lazy: each key is read once, or twice
    with save_projections. dtype: of the written weights; default the projections' own. max_shard_size in bytes.
    source: another engine, which gets each weight as it is written and with whose logits the result is verified.
    """
    reader = open_teacher(teacher)
    shape = replace(teacher.shape, hidden_size=student_hidden_size, is_tied="lm_head" not in projections)
    _check_names(teacher, shape, projections=projections, norms=norms)

    def weight_of(weight: Weight) -> Tensor:
        return _student_weight(weight, reader, student_hidden_size, projections=projections, norms=norms)

    def write_extra(folder: Path) -> None:
        if save_projections:
            _write_projections(folder / PROJECTIONS_FILE, teacher.shape, shape, projections=projections, norms=norms)

    export_model(
        base=teacher,
        shape=shape,
        weight_of=weight_of,
        dtype=dtype or projections["embed"].dtype,
        output=output,
        arch=arch,
        model_card=model_card,
        max_shard_size=max_shard_size,
        force=force,
        verify=verify,
        source=source,
        write_extra=write_extra,
    )


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
    write_extra: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a model of this shape that has `base`'s config.json in everything else, and its tokenizer.

    weight_of: asked once for each weight, one after another; what it gives is written in `dtype`. Other arguments: as
    of `export_student`.
    """
    with complete_or_absent(output, source=base.directory, force=force) as partial:
        family = student_family(base, shape.hidden_size, arch, num_heads=shape.num_attention_heads)
        weights = {weight.name: weight for weight in expected_weights(family, shape)}

        def tensor_of(name: str) -> Tensor:
            weight = weights[name]
            written = weight_of(weight).to(dtype)
            if source is not None and verify:
                source.add(weight.key, written)
            return written

        write_model(
            partial,
            {name: weight.shape for name, weight in weights.items()},
            dtype=dtype,
            tensor_of=tensor_of,
            max_shard_size=max_shard_size,
        )
        config = json.dumps(student_config(base, shape, family, dtype=dtype), indent=2, sort_keys=True)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
        copy_files(base.directory, partial)
        write_extra(partial)
        if model_card is not None:
            (partial / "README.md").write_text(model_card, encoding="utf-8")
        if verify:
            check_export(partial, base, source)


def check_export(directory: Path, teacher: TeacherDescription, source: Source | None = None) -> None:
    """Open what was written with plain transformers: every key in its place, finite logits, those of the source
    (their largest difference is printed), the teacher's tokenizer."""
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
    if any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        ours, theirs = (
            transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)(_SAMPLE_TEXT)["input_ids"]
            for path in (directory, teacher.directory)
        )
        if ours != theirs:
            return "its tokenizer and the teacher's split the same text differently"
    return None


def _failed(reason: str) -> str:
    return f"The exported student fails its self-check: {reason}. Nothing was kept. --no-verify writes it all the same."


def _student_weight(
    weight: Weight,
    reader: Reader,
    hidden: int,
    *,
    projections: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
) -> Tensor:
    """A weight in the projections' dtype, a norm gain, or a frozen tensor. `given` is P [D, d] or the gain [d]."""
    if weight.is_zero:
        return torch.zeros(weight.shape)
    if weight.is_frozen:
        assert weight.layer is not None, f"{weight.key} belongs to no layer"
        return reader.frozen(weight.key.rpartition(".")[2], weight.layer)
    given = norms[weight.key] if weight.site is None else projections[weight.key]
    teacher_hidden = reader.description.shape.hidden_size
    expected = (hidden,) if weight.site is None else (teacher_hidden, hidden)
    if tuple(given.shape) != expected:
        raise ConfigError(
            f"The student's {weight.key} has shape {list(given.shape)}; with this teacher and hidden size {hidden}, "
            f"{list(expected)} is expected. Export with the teacher of the training run."
        )
    if weight.site is None:
        return given
    return compose(weight.site, reader.site(weight.site, weight.layer).to(given.dtype), given)


def _write_projections(
    path: Path,
    teacher: ModelShape,
    student: ModelShape,
    *,
    projections: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
) -> None:
    """projections.safetensors, in the projections' own dtype: their names, and the norm gains' under `norms.`"""
    names = projection_names(range(student.num_layers), True, not student.is_tied)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (teacher.hidden_size, student.hidden_size))
    shapes |= {f"norms.{name}": (student.hidden_size,) for name in norms}

    def tensor_of(name: str) -> Tensor:
        return norms[name.removeprefix("norms.")] if name.startswith("norms.") else projections[name]

    write_tensors(path, shapes, dtype=projections["embed"].dtype, tensor_of=tensor_of)


def _check_names(
    teacher: TeacherDescription, shape: ModelShape, *, projections: Mapping[str, Tensor], norms: Mapping[str, Tensor]
) -> None:
    """The student must be one that this teacher can have. Shapes are checked when each tensor is read."""
    if shape.is_tied and not teacher.shape.is_tied:
        raise ConfigError(
            "The student has no lm_head projection, but its teacher's embedding and LM head are two matrices: one "
            "projection cannot make both. Train with --untie-embeddings-and-output-weights."
        )
    wanted = expected_weights(teacher.family, shape)
    for kind, found, keys in (
        ("projections", projections, [weight.key for weight in wanted if weight.site is not None]),
        ("norm gains", norms, [weight.key for weight in wanted if weight.is_norm_gain]),
    ):
        differing = sorted(set(found) ^ set(keys))
        if differing:
            raise ConfigError(
                f"The student's {kind} and its teacher's layers do not belong together: "
                f"{', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''} on one side only. Export with "
                "the teacher of the training run."
            )
    dtype = projections["embed"].dtype
    assert dtype in DTYPES, f"projections in {dtype}"
