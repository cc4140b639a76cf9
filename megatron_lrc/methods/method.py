"""`Method`: what the rest of the code asks of a way to train a student. One class per method, in its folder.

Its first half needs no torch: flags, shapes, words, what changes during a run. The second half, `build_stages` and
`change`, is its folder's `building.py`, which is imported when it is called. Whoever works on stages then looks at
the interface of `mcore.stages.PipelineStage` only; nobody outside this package asks which method runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from megatron_lrc.config import (
    CLONE_TERMS,
    MATRICES,
    Config,
    LossConfig,
    ModelShape,
    ProjectionConfig,
    PruningConfig,
    check_directory,
    check_kept_sizes,
    check_layers,
    check_layers_against,
    describe_layers,
    fields_of,
    flags_set,
    is_slimmer,
    kept_sizes,
    student_layers,
)

if TYPE_CHECKING:
    import torch

    from megatron_lrc.hf.families import TeacherDescription
    from megatron_lrc.hf.reader import Reader
    from megatron_lrc.mcore.distributed import Groups
    from megatron_lrc.mcore.stages import PipelineStage

#: Flags that mean something only for projections and the clone loss.
CLONE_ONLY = fields_of(ProjectionConfig) - {"init_method_std"} | {
    *("alpha", "clone_normalization", "clone_terms", "clone_attention_output", "detach_clone_targets", "share_compose")
}
#: Flags that mean something only where there is a teacher, but its model flags.
TEACHER_ONLY = CLONE_ONLY | fields_of(LossConfig) - {"loss_chunk_tokens"}


@dataclass(frozen=True, slots=True)
class Materials:
    """What a rank's stages are built from.

    base, reader: the teacher, or the model to train, and its weights. calibration: opens the training data from its
    start. is_new: whether what is trained gets the values that training begins with; else it is still to be loaded.
    has_changed: whether the stages are to be as `Method.change` leaves them. is_resumed: whether the run goes on from a
    checkpoint of its own, which has constants of the losses too. checkpoint: what is still to be loaded, with what the
    stages are built by.
    """

    base: TeacherDescription
    reader: Reader
    groups: Groups
    dtype: torch.dtype
    calibration: Callable[[], Iterator[dict[str, torch.Tensor]]]
    is_new: bool
    has_changed: bool = False
    is_resumed: bool = True
    checkpoint: Path | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """What a model card says of how its model came to be, in the words of `hf.student_config.model_card`."""

    suffix: str
    origin: str
    licence: str
    tags: tuple[str, ...] = ()


class Method(ABC):
    """What --method says of a run with this configuration.

    has_teacher: whether a frozen teacher runs beside the student. has_projections: whether the student's weights are
    made of the teacher's, at least to begin with. has_layer_losses: whether --alpha weighs losses between the layers
    of both. layer_terms: columns of those losses in records. is_estimated: whether memory and time are.
    """

    has_teacher = True
    #: What the trained model is called.
    noun = "student"
    has_projections = False
    has_layer_losses = False
    layer_terms: tuple[str, ...] = CLONE_TERMS
    is_estimated = True
    #: Whether what was trained before `change` goes on with its moments.
    keeps_moments = True

    def __init__(self, config: Config):
        self.config = config

    def reads_base(self, *, has_weights: bool) -> bool:
        """Whether the weights at --teacher or --student matter to a start. has_weights: a checkpoint has them."""
        return self.has_teacher or not has_weights

    @property
    def name(self) -> str:
        return self.config.model.method

    # --- checks of flags ------------------------------------------------------------------------------------------

    def check(self) -> Iterator[str]:
        """Errors that can be seen without the teacher, a sentence or two each."""
        if given := flags_set(self.config, fields_of(PruningConfig)):
            yield f"{given} cannot go with --method {self.name}, which prunes nothing. Leave it out."
        yield from self.check_models()
        yield from check_layers(self.config.model)

    def check_models(self) -> Iterator[str]:
        """Of a clone or a distillation: a teacher, and the student's width."""
        model = self.config.model
        if model.student is not None:
            yield (
                f"--student {model.student} is the model that --method ordinary trains. Add that, or give --teacher "
                "and --student-hidden-size for a clone."
            )
        if model.teacher is None:
            yield "--teacher is missing: the Hugging Face directory of the model to clone."
        else:
            yield from check_directory("--teacher", model.teacher)
        if model.student_hidden_size is None:
            yield "--student-hidden-size is missing: the student's hidden size, below the teacher's."

    def check_against(self, base: ModelShape) -> Iterator[str]:
        """Errors that depend on the shape of the teacher, or of the model that is trained by itself."""
        yield from check_layers_against(self.config.model, base.num_layers)
        yield from check_kept_sizes(self.config.model, base, self.config.parallel.tensor_model_parallel_size)
        backend = self.config.compute.attention_backend
        if base.attention_soft_cap and backend not in ("auto", "local"):
            yield (
                f"--attention-backend {backend} cannot cap the scores of attention, as this model does. Leave it out: "
                "torch operations compute that."
            )

    def check_new(self, base: ModelShape) -> Iterator[str]:
        """Errors of a run that starts, and not from another one's weights: it cannot have its first values."""
        yield from ()

    def warn_against(self, base: ModelShape) -> Iterator[str]:
        """What is allowed, but probably not meant."""
        count = self.config.model.student_num_layers
        if self.has_teacher and count and not self.config.model.student_layers and count < base.num_layers:
            yield (
                f"--student-num-layers {count} spreads the layers evenly, and may leave out one that matters much. "
                "tools/plan.py layers measures them, and prints the --student-layers to use."
            )

    def why_no_dry_run(self) -> str | None:
        """What --dry-run says where it cannot estimate this method at all."""
        return None

    # --- the student ----------------------------------------------------------------------------------------------

    @property
    def starts_anew(self) -> bool:
        """Whether the base model gives its shape only, and no weights."""
        return False

    def student_shape(self, base: ModelShape) -> ModelShape:
        """The student's shape at the end: the base model's but for the hidden size, and maybe layers, KV groups, FFN
        neurons, tying and epsilon."""
        model = self.config.model
        assert model.student_hidden_size is not None, "student_shape() needs a validated config"
        epsilon = base.norm_epsilon if model.student_norm_epsilon is None else model.student_norm_epsilon
        layers = student_layers(model, base.num_layers)
        return replace(
            base,
            hidden_size=model.student_hidden_size,
            num_layers=len(layers) or base.num_layers,
            **kept_sizes(model, base),
            teacher_layers=layers,
            is_tied=self._is_tied(base),
            norm_epsilon=epsilon,
        )

    def divided_shape(self, base: ModelShape) -> ModelShape:
        """Whose layers pipeline stages are made of: the teacher's, or those of the model that is trained by itself."""
        return base if self.has_teacher else self.student_shape(base)

    def shape_of_phase(self, base: ModelShape, *, has_changed: bool) -> ModelShape:
        """The shape that the student has before, or after, `change`."""
        return self.student_shape(base)

    def _is_tied(self, base: ModelShape) -> bool:
        """Whether embedding and LM head are one: the rule of --untie-embeddings-and-output-weights."""
        untie = self.config.model.untie_embeddings_and_output_weights
        return base.is_tied if untie is None else not untie

    def own_matrices(self, *, has_changed: bool) -> frozenset[str]:
        """Matrices, of MATRICES, that the student has as its own; the others are composed of the teacher's."""
        return frozenset(MATRICES)

    def num_beside(self, base: ModelShape, student: ModelShape) -> int:
        """Elements that are trained and saved beside the student: none, but for learned maps."""
        return 0

    # --- losses ---------------------------------------------------------------------------------------------------

    def terms_of(self, layer: int) -> set[str]:
        """Names, of `layer_terms`, of the losses between layers that are on in a layer (from 0)."""
        return set()

    def losses(self, lm: float, kl: float, clone: float, teacher_lm: float) -> dict[str, float | None]:
        """A record's losses from their means over tokens: `loss` is what is minimised."""
        weights = self.config.loss
        return {
            "loss": weights.lm_weight * lm + self.config.total_kl_weight * kl + weights.alpha * clone,
            "lm_loss": lm,
            "kl_loss": kl,
            "clone_loss": clone,
            "teacher_lm_loss": teacher_lm or None,
        }

    # --- what changes during a run --------------------------------------------------------------------------------

    @property
    def changes(self) -> bool:
        """Whether `change_step` is some step; known also while the run's steps are not."""
        return False

    @property
    def changes_at_once(self) -> bool:
        """Whether that is before the first step, so that the run has one phase only."""
        return False

    @property
    def change_step(self) -> int | None:
        """After which step something else is trained; None: never."""
        return None

    def config_of_phase(self, *, has_changed: bool) -> Config:
        """With the learning rate of now."""
        return self.config

    def describe_change(self, student: ModelShape, trained: int) -> str:
        """What the console says of it. student: the shape after it. trained: parameters that are, from then on."""
        raise NotImplementedError(f"--method {self.name} changes nothing")

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def check_continues(self, before: Method, base: ModelShape, *, path: Path, changed_at: int | None) -> str | None:
        """Why a checkpoint of the method `before`, of another run's flags, cannot be continued with these; or None."""
        return None

    def why_not_resumed(self, path: Path, before: Config) -> str | None:
        """Why a checkpoint cannot be continued (--load), where its weights could be the start of another run. before:
        the configuration that wrote it."""
        return None

    def why_no_start(self, path: Path, changed_at: int | None) -> str | None:
        """Why a checkpoint of this method cannot be --pretrained-checkpoint; or None."""
        return None

    def why_no_student(self, path: Path, step: int, changed_at: int | None) -> str | None:
        """Why a checkpoint holds no student that could be exported; or None."""
        return None

    # --- what it says of itself -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def title(self) -> str:
        """A report's subtitle."""

    def headline(self, base: ModelShape, student: ModelShape, trained: int, *, has_changed: bool) -> str:
        """The console's line about the models. trained: parameters."""
        return (
            f"teacher d_T {base.hidden_size}, student d_S {width_and_depth(student)}{describe_parts(student, base)}; "
            f"trained: {trained / 1e6:.1f}M parameters{self.trained_where(has_changed=has_changed)}"
        )

    def trained_where(self, *, has_changed: bool) -> str:
        """The end of the headline: of what the trained parameters are a part."""
        return ", all of the student's"

    def describe_trained(self, count: Callable[[bool], int]) -> Iterator[str]:
        """Lines of a dry run. count: trained parameters before, or after (True), `change`."""
        yield f"trained: {count(False) / 1e6:.1f}M parameters, all of the student"

    @abstractmethod
    def origin(self, name: str, base: ModelShape, changed_at: int | None) -> Origin:
        """What a model card says of how the student came to be. name, base: of the base model."""

    def _trained(self, name: str, story: str, *, suffix: str) -> Origin:
        """Of a student that has matrices of its own. story: the rest of the sentence."""
        trained = f"trained with megatron_lrc by the method `{self.name}`: {story}"
        return Origin(suffix, trained, f"The licence of `{name}` may apply.")

    # --- stages ---------------------------------------------------------------------------------------------------

    def build_stages(self, materials: Materials) -> Sequence[PipelineStage]:
        """This rank's stages (one, without interleaving), their weights in place. Collective."""
        return self._building.build_stages(self, materials)

    def change(self, stages: Sequence[PipelineStage]) -> None:
        """From here on something else is trained: it is new, and so has to be whatever trains it. Collective."""
        self._building.change_stages(self, stages)

    @property
    def _building(self) -> ModuleType:
        """The folder's `building.py`, which loads torch. It has `build_stages`, and `change_stages` if there is one."""
        return import_module(f"megatron_lrc.methods.{self.name}.building")


def describe_tying(shape: ModelShape) -> str:
    return "tied" if shape.is_tied else "untied"


def width_and_depth(shape: ModelShape) -> str:
    return f"{shape.hidden_size} ({describe_tying(shape)}), {describe_depth(shape)}"


def describe_parts(student: ModelShape, base: ModelShape) -> str:
    """What a slimmer student's layers have of those of the base model."""
    if not is_slimmer(student, base):
        return ""
    return (
        f", {student.num_query_groups} of {base.num_query_groups} KV groups, {student.ffn_hidden_size} of "
        f"{base.ffn_hidden_size} FFN neurons"
    )


def describe_size(shape: ModelShape) -> str:
    """All that flags may choose of a student's size."""
    return f"{width_and_depth(shape)}, {shape.num_query_groups} KV groups, {shape.ffn_hidden_size} FFN neurons"


def describe_depth(shape: ModelShape) -> str:
    """`15 layers`, and which of the teacher's they are made of where it has others too."""
    of_teacher = f" (the teacher's {describe_layers(shape.teacher_layers)})" if shape.teacher_layers else ""
    return f"{shape.num_layers} layers{of_teacher}"
