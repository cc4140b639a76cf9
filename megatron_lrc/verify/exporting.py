"""A checkpoint's student -> a verified Hugging Face directory, for tools/convert_to_hf.py and evaluations.

Any method's checkpoint: what is cloned is composed from its teacher, what is a student's own is written as it
is.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_lrc.checkpoints.saved_student import SavedStudent
from megatron_lrc.config import describe_changes
from megatron_lrc.hf.export import Source, export_model
from megatron_lrc.hf.families import TeacherDescription
from megatron_lrc.hf.forward import fixed_tokens
from megatron_lrc.hf.kept_file import write_kept
from megatron_lrc.hf.rope import rotations
from megatron_lrc.hf.student_config import Arch, model_card, student_family
from megatron_lrc.hf.student_weights import StudentWeights
from megatron_lrc.methods import method_of

#: Sections of the settings that a model card shows; the others hold paths of the training machine.
CARD_SECTIONS = ("projection", "pruning", "loss", "optimizer", "training")


def export_saved(
    student: SavedStudent,
    base: TeacherDescription,
    *,
    output: Path,
    losses: dict[str, float] | None = None,
    dtype: torch.dtype | None = None,
    arch: Arch = "auto",
    save_projections: bool = False,
    max_shard_size: int = 5 * 10**9,
    force: bool = False,
    verify: bool = True,
) -> str:
    """Write what `open_student` has opened to `output`; gives the class that transformers will load.

    losses: of the last validation, for the model card. dtype: of the weights; default that of the training.
    save_projections: write them beside the weights they have made. The other arguments are those of
    `export_model`. ConfigError where the result fails its self-check.
    """
    shape = student.shape
    family = student_family(base, shape.hidden_size, arch, num_heads=shape.num_attention_heads)
    weights = StudentWeights.of(student, base)
    name = base.directory.resolve().name
    origin = method_of(student.config).origin(name, base.shape, student.state.changed_at)
    card = model_card(
        base=base,
        family=family,
        shape=shape,
        **asdict(origin),
        tokens=student.state.tokens,
        steps=student.state.step,
        losses=losses,
        settings=describe_changes(student.config, CARD_SECTIONS),
    )

    def write_beside(folder: Path) -> None:
        write_kept(folder, shape, student.kept)
        if save_projections:
            weights.write_projections(folder)

    with _engine(student, base) if verify else nullcontext() as source:
        export_model(
            base=base,
            shape=shape,
            weight_of=weights,
            dtype=dtype or student.dtype,
            output=output,
            arch=arch,
            model_card=card,
            max_shard_size=max_shard_size,
            force=force,
            verify=verify,
            source=source,
            data_fingerprint=student.state.tokenizer_fingerprint,
            write_extra=write_beside,
        )
    return family.architecture


def _engine(student: SavedStudent, base: TeacherDescription) -> AbstractContextManager[Source]:
    from megatron_lrc.mcore.layer_by_layer import layer_by_layer  # here, since it imports megatron-core

    tokens = fixed_tokens(student.shape.vocab_size)
    return layer_by_layer(student.shape, rotations(base, tokens.shape[1]), tokens)
