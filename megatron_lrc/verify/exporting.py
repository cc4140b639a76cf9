"""A checkpoint's student -> a verified Hugging Face directory, for tools/convert_to_hf.py and evaluations.

Any method's checkpoint: what is cloned is composed from its teacher, what is a student's own is written as it
is.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_lrc.checkpoints.saved_student import SavedStudent
from megatron_lrc.config import Config, describe_changes
from megatron_lrc.hf.export import Source, export_model
from megatron_lrc.hf.families import TeacherDescription, rope_inverse_frequencies
from megatron_lrc.hf.forward import fixed_tokens
from megatron_lrc.hf.student_config import Arch, model_card, student_family
from megatron_lrc.hf.student_weights import StudentWeights

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
    card = model_card(
        base=base,
        family=family,
        shape=shape,
        **asdict(_origin(student.config, base, opened_at=student.opened_at, pruned_at=student.pruned_at)),
        tokens=student.tokens,
        steps=student.step,
        losses=losses,
        settings=describe_changes(student.config, CARD_SECTIONS),
    )
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
            write_extra=weights.write_projections if save_projections else lambda folder: None,
        )
    return family.architecture


@dataclass(frozen=True, slots=True)
class Origin:
    """What a model card says of how its model came to be, in the words of `model_card`."""

    suffix: str
    origin: str
    licence: str
    tags: tuple[str, ...] = ()


def _origin(config: Config, base: TeacherDescription, *, opened_at: int | None, pruned_at: int | None) -> Origin:
    """opened_at: the step after which a clone was opened. pruned_at: that after which the model was cut."""
    name, method = base.directory.resolve().name, config.model.method
    trained = f"trained with megatron_lrc by the method `{method}`:"
    licence = f"The licence of `{name}` may apply."
    lm_loss_alone = f"{trained} all of its weights, on the\nlanguage-modelling loss alone."
    anew = f"It started anew, in the shape of `{name}` but for its hidden size."
    if opened_at is not None:
        opened = "those of the MLPs" if config.projection.open_matrices == "mlp" else "all of them"
        story = (
            f"for\n{opened_at:,} steps its matrices were those of `{name}`, multiplied by trained "
            f"projections (Low-Rank Clone, arXiv\n2505.12781); from there on {opened} were trained "
            "themselves, on the same losses."
        )
        return Origin("LRC-opened", f"{trained} {story}", licence)
    if config.is_clone:
        hidden = base.shape.hidden_size
        story = (
            f"made from `{name}` (hidden size {hidden})\nwith Low-Rank Clone (LRC, arXiv 2505.12781) by "
            "megatron_lrc.\n\nEvery weight matrix is the teacher's, multiplied by a trained projection of "
            f"{hidden} x {config.model.student_hidden_size};\nnothing but the projections and the norm gains "
            "was trained. Everything else is the teacher's."
        )
        return Origin("LRC", story, "The teacher's licence applies.", ("low-rank-clone",))
    if pruned_at is not None:
        story = f"It started as `{name}`, which was pruned after {pruned_at:,} steps with\nlearnt masks"
        return Origin("sheared", f"{lm_loss_alone} {story} (arXiv 2310.06694).", licence)
    if config.has_teacher:
        story = f"all of its weights, beside\nits teacher `{name}`. {anew}"
        return Origin(method, f"{trained} {story}", licence)
    if config.model.student is None:
        return Origin("new", f"{lm_loss_alone} {anew}", licence)
    return Origin("trained", f"{lm_loss_alone} It started from the weights of `{name}`.", licence)


def _engine(student: SavedStudent, base: TeacherDescription) -> AbstractContextManager[Source]:
    from megatron_lrc.mcore.layer_by_layer import layer_by_layer  # here, since it imports megatron-core

    return layer_by_layer(student.shape, rope_inverse_frequencies(base), fixed_tokens(student.shape.vocab_size))
