"""A checkpoint's student -> a verified Hugging Face directory: what tools/convert_to_hf.py does, and evaluations need.

Any method's checkpoint: what is cloned is composed from its teacher, what is a student's own is written as it is.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from megatron_lrc.checkpoints.saved_student import SavedStudent
from megatron_lrc.config import describe_changes
from megatron_lrc.hf.export import Source, export_model, export_student
from megatron_lrc.hf.families import TeacherDescription, rope_inverse_frequencies
from megatron_lrc.hf.forward import fixed_tokens
from megatron_lrc.hf.student_config import Arch, model_card, own_model_card, student_family
from megatron_lrc.methods import method_of
from megatron_lrc.verify.weight_streams import student_weight

CARD_SECTIONS = (
    "projection",
    "pruning",
    "loss",
    "optimizer",
    "training",
)  # the others hold paths of the training machine


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

    losses: of the last validation, for the model card. dtype: of the weights; default that of the training. The other
    arguments are those of `export_student`. ConfigError where the result fails its self-check.
    """
    shape = student.shape
    family = student_family(base, shape.hidden_size, arch, num_heads=shape.num_attention_heads)
    described = {
        "family": family,
        "tokens": student.tokens,
        "steps": student.step,
        "losses": losses or {},
        "settings": describe_changes(student.config, CARD_SECTIONS),
    }
    with _engine(student, base) if verify else nullcontext() as source:
        common = {
            "dtype": dtype or student.dtype,
            "output": output,
            "arch": arch,
            "max_shard_size": max_shard_size,
            "force": force,
            "verify": verify,
            "source": source,
        }
        if student.is_composed:
            export_student(
                teacher=base,
                projections=student.projections,
                norms=student.norms,
                student_hidden_size=student.shape.hidden_size,
                save_projections=save_projections,
                model_card=model_card(
                    teacher=base,
                    student_hidden_size=student.shape.hidden_size,
                    is_tied=student.shape.is_tied,
                    **described,
                ),
                **common,
            )
        else:
            export_model(
                base=base,
                shape=student.shape,
                weight_of=student_weight(student, base),
                model_card=own_model_card(
                    base=base,
                    shape=shape,
                    config=student.config,
                    opened_at=student.changed_at if method_of(student.config).has_teacher else None,
                    pruned_at=None if method_of(student.config).has_teacher else student.changed_at,
                    **described,
                ),
                **common,
            )
    return family.architecture


def _engine(student: SavedStudent, base: TeacherDescription) -> AbstractContextManager[Source]:
    from megatron_lrc.mcore.layer_by_layer import layer_by_layer  # here, since it imports megatron-core

    return layer_by_layer(student.shape, rope_inverse_frequencies(base), fixed_tokens(student.shape.vocab_size))
