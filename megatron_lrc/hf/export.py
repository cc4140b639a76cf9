"""Student -> plain Hugging Face directory: config, weights, tokenizer, model card, and a self-check.

Each weight is composed here with `sites.compose`, in the dtype of the projections, exactly as training composes it,
and goes to disk before the next one is read: memory holds one teacher matrix, its projection and the result, whatever
the model.

Everything is written into a hidden directory beside the output, loaded once by plain transformers, and renamed at the
end: the output is complete or absent.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from megatron_lrc.clone.sites import compose, projection_names
from megatron_lrc.config import ConfigError, ModelShape
from megatron_lrc.hf.families import TeacherDescription, Weight, expected_weights
from megatron_lrc.hf.safetensors_writer import DTYPES, write_model, write_tensors
from megatron_lrc.hf.student_config import Arch, student_config, student_family
from megatron_lrc.hf.teacher import WEIGHT_FILES, TeacherReader

PROJECTIONS_FILE = "projections.safetensors"

#: What makes a tokenizer, a chat format and generation defaults; copied as it is.
COPIED_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

_SAMPLE_TEXT = "The low-rank clone answers: 3.14 * 2 = 6.28, isn't it?\n\n  Line two."


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
) -> None:
    """Write the student that these projections and norm gains make of this teacher.

    projections: `embed`, `lm_head` (absent when tied), `layers.{i}.{q,k,v,o,gate,up,down}`, each a full (D, d) matrix.
    norms: `layers.{i}.input`, `layers.{i}.post`, `final`, each (d,). Both may be lazy: each key is read once, or twice
    with save_projections. dtype: of the written weights; default the projections' own. max_shard_size in bytes.
    """
    with _complete_or_absent(output, teacher=teacher, force=force) as partial:
        reader = TeacherReader(teacher)
        shape = replace(teacher.shape, hidden_size=student_hidden_size, is_tied="lm_head" not in projections)
        _check_names(teacher, shape, projections=projections, norms=norms)
        family = student_family(teacher, student_hidden_size, arch)
        dtype = dtype or projections["embed"].dtype
        weights = {weight.name: weight for weight in expected_weights(family, shape)}

        write_model(
            partial,
            {name: weight.shape for name, weight in weights.items()},
            dtype=dtype,
            tensor_of=lambda name: _student_weight(
                weights[name], reader, student_hidden_size, projections=projections, norms=norms
            ),
            max_shard_size=max_shard_size,
        )
        config = json.dumps(student_config(teacher, shape, family, dtype=dtype), indent=2, sort_keys=True)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
        for name in COPIED_FILES:
            if (teacher.directory / name).is_file():
                shutil.copyfile(teacher.directory / name, partial / name)
        if save_projections:
            _write_projections(partial / PROJECTIONS_FILE, teacher.shape, shape, projections=projections, norms=norms)
        if model_card is not None:
            (partial / "README.md").write_text(model_card, encoding="utf-8")
        if verify:
            check_export(partial, teacher)


def check_export(directory: Path, teacher: TeacherDescription) -> None:
    """Load what was written with plain transformers: every key in its place, finite logits, the teacher's tokenizer."""
    progress_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        reason = _find_fault(directory, teacher)
    except Exception as error:  # whatever transformers raises, the export is not one that a user can load
        raise ConfigError(_failed(f"{type(error).__name__}: {' '.join(str(error).split())}")) from error
    finally:
        if progress_bars:
            transformers.utils.logging.enable_progress_bar()
    if reason is not None:
        raise ConfigError(_failed(reason))


def _find_fault(directory: Path, teacher: TeacherDescription) -> str | None:
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", local_files_only=True, output_loading_info=True
    )
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            return f"transformers {transformers.__version__} reports {kind} {sorted(report[kind])[:4]}"
    tokens = (torch.arange(64) * 7919 % teacher.shape.vocab_size).view(2, 32)
    with torch.no_grad():
        logits = model(tokens).logits  # [2, 32, v]
    if not bool(logits.isfinite().all()):
        return "its logits are not finite, so the run has diverged or --dtype is too narrow"
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
    reader: TeacherReader,
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


@contextmanager
def _complete_or_absent(output: Path, *, teacher: TeacherDescription, force: bool) -> Iterator[Path]:
    """A directory beside `output` to write into: renamed to it when the block ends well, deleted when it does not."""
    output = output.resolve()
    _check_output(output, teacher=teacher, force=force)
    partial, replaced = (output.with_name(f".{output.name}.{suffix}") for suffix in ("partial", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            output.rename(replaced)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _check_output(output: Path, *, teacher: TeacherDescription, force: bool) -> None:
    """Refuse to lose anything but an earlier export, and that only by --force."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file. A directory to create is expected. Give another name.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not force:
        raise ConfigError(f"--output {output} is not empty. Give another directory, or --force to replace it.")
    is_model = (output / "config.json").is_file() and any((output / name).is_file() for name in WEIGHT_FILES)
    teacher_directory = teacher.directory.resolve()
    if not is_model or output in (teacher_directory, *teacher_directory.parents):
        raise ConfigError(
            f"--output {output} is not an earlier export (no config.json and safetensors in it, or it holds the "
            "teacher), so --force does not replace it. Give another directory."
        )
