"""--method ordinary: one model by itself, all of it, on the LM loss; from a model's weights, or anew in its shape."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lrc.config import (
    ModelShape,
    check_directory,
    flag_of,
    flags_set,
    refuse_kept_sizes,
    refuse_layers,
)
from megatron_lrc.methods.method import TEACHER_ONLY, Method, Origin, width_and_depth

#: For model cards.
LM_LOSS_ALONE = "all of its weights, on the\nlanguage-modelling loss alone."


class WithoutTeacher(Method):
    """A model that is trained by itself, on the LM loss alone."""

    has_teacher = False
    noun = "model"
    is_estimated = False

    def check_no_teacher(self, why: str) -> Iterator[str]:
        """Flags that mean nothing without a teacher beside the student. why: the end of a clause."""
        if given := flags_set(self.config, TEACHER_ONLY):
            yield f"{given} cannot go with --method {self.name}, which {why}. Leave it out."
        if self.config.compute.teacher_fp8:
            yield f"--teacher-fp8 cannot go with --method {self.name}, which has no teacher. Leave it out."

    def headline(self, base: ModelShape, student: ModelShape, trained: int, *, has_changed: bool) -> str:
        return (
            f"ordinary training of a model of hidden size {width_and_depth(student)}; "
            f"trained: {trained / 1e6:.1f}M parameters, all that there are"
        )

    def losses(self, lm: float, kl: float, clone: float, teacher_lm: float) -> dict[str, float | None]:
        return {"loss": lm, "lm_loss": lm}


class OrdinaryTraining(WithoutTeacher):
    def check_models(self) -> Iterator[str]:
        """A model to start from, or the shape of a new one; and nothing that needs a teacher."""
        model = self.config.model
        if model.student is not None:
            shape = ("teacher", "student_hidden_size", "student_norm_epsilon", "untie_embeddings_and_output_weights")
            given = [flag_of(name) for name in shape if getattr(model, name) is not None]
            if given:
                yield (
                    f"--student {model.student} is the model to train, in its own shape: {' and '.join(given)} cannot "
                    "go with it. Keep one."
                )
            yield from check_directory("--student", model.student)
            yield from refuse_layers(model, "--student, whose layers are all trained")
            yield from refuse_kept_sizes(model, "--student, whose layers are trained as they are")
        elif model.teacher is None or model.student_hidden_size is None:
            yield (
                "--method ordinary needs a model: --student DIR to go on from its weights, or --teacher DIR (its "
                "config.json) and --student-hidden-size N to start anew."
            )
        else:
            yield from check_directory("--teacher", model.teacher)
            if model.student_layers:
                yield (
                    f"--student-layers {' '.join(model.student_layers)} cannot go with --method ordinary, which makes "
                    "no layer of the teacher's. Give their number, --student-num-layers."
                )
        yield from self.check_no_teacher("has no teacher")

    @property
    def starts_anew(self) -> bool:
        return self.config.model.student is None

    def student_shape(self, base: ModelShape) -> ModelShape:
        """With --student that model's own shape. A new model's layers are made of nobody's."""
        return super().student_shape(base).without_teacher() if self.starts_anew else base

    @property
    def title(self) -> str:
        model = self.config.model
        if self.starts_anew:
            return (
                f"Ordinary training from scratch: {model.teacher}'s shape with hidden size {model.student_hidden_size}"
            )
        return f"Ordinary training of {model.student}"

    def origin(self, name: str, base: ModelShape, changed_at: int | None) -> Origin:
        if self.starts_anew:
            return self._trained(name, f"{LM_LOSS_ALONE} {started_anew(name)}", suffix="new")
        return self._trained(name, f"{LM_LOSS_ALONE} It started from the weights of `{name}`.", suffix="trained")


def started_anew(name: str) -> str:
    """A model card's sentence. name: of the model whose shape it is."""
    return f"It started anew, in the shape of `{name}` but for its hidden size."
