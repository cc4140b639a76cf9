"""--method sheared: a model is pruned with learnt masks, then trained on (Sheared-LLaMA, arXiv 2310.06694)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_lrc.config import ModelShape, check_directory, flag_of, refuse_kept_sizes, refuse_layers
from megatron_lrc.methods.method import Method, Origin, width_and_depth
from megatron_lrc.methods.ordinary.method import LM_LOSS_ALONE, WithoutTeacher


class Sheared(WithoutTeacher):
    keeps_moments = False  # nothing that was trained before the cut is trained after it

    # --- checks of flags ------------------------------------------------------------------------------------------

    def check(self) -> Iterator[str]:
        """A model to prune, what it is pruned to, and nothing that needs a teacher beside a student."""
        model, after = self.config.model, self.config.pruning.prune_after
        if model.student is not None:
            yield f"--student {model.student}: the model that --method sheared prunes is --teacher. Give it there."
        if model.teacher is None:
            yield "--teacher is missing: the Hugging Face directory of the model to prune."
        else:
            yield from check_directory("--teacher", model.teacher)
        if model.student_hidden_size is None:
            yield "--student-hidden-size is missing: the hidden size to prune to; the teacher's leaves it as it is."
        if model.untie_embeddings_and_output_weights is not None:
            yield (
                "--untie-embeddings-and-output-weights cannot go with --method sheared: the pruned model is tied if "
                "--teacher is. Leave it out."
            )
        if model.student_norm_epsilon is not None:
            yield (
                f"--student-norm-epsilon {model.student_norm_epsilon:g} cannot go with --method sheared, which prunes "
                "--teacher as it is, with its epsilon. Leave it out."
            )
        yield from refuse_layers(model, "--method sheared, which prunes no layers")
        own = "--pruned-num-query-groups and --pruned-ffn-hidden-size"
        yield from refuse_kept_sizes(model, f"--method sheared, which has {own} for that")
        yield from self.check_no_teacher("has no teacher beside it")
        if after >= 1 and after != int(after):
            yield f"--prune-after {after:g} is no number of steps. Give a whole one, or a fraction below 1."
        if self.config.checkpoint.pretrained_checkpoint is not None:
            yield "--pretrained-checkpoint cannot go with --method sheared, which starts from --teacher. Leave it out."
        if self.config.compute.fp8_format is not None:
            yield "--fp8-format cannot go with --method sheared: its scales are those of the uncut model. Leave it out."
        if self.config.parallel.tp_comm_overlap:
            yield (
                "--tp-comm-overlap cannot go with --method sheared, whose hidden size changes when the model is cut: "
                "its buffers are of one size. Leave it out."
            )

    def check_against(self, base: ModelShape) -> Iterator[str]:
        """Pruned to no more than there is, and to what TP divides."""
        if base.has_norms_after or base.has_wide_qk_norm or base.scales_embeddings:
            yield (
                "--method sheared cannot prune this teacher: the mask of a channel or a head would change what norms "
                "behind its blocks, or over all heads together, do to the others. Use --method lrc."
            )
        pruned, tp = self.student_shape(base), self.config.parallel.tensor_model_parallel_size
        sizes = {
            "student_hidden_size": (pruned.hidden_size, base.hidden_size),
            "pruned_num_query_groups": (pruned.num_query_groups, base.num_query_groups),
            "pruned_ffn_hidden_size": (pruned.ffn_hidden_size, base.ffn_hidden_size),
        }
        for name, (size, most) in sizes.items():
            if size > most:
                yield (
                    f"{flag_of(name)} {size} is above the teacher's {most}; pruning only takes away. "
                    f"Use at most {most}."
                )
            elif name != "student_hidden_size" and size % tp:
                yield (
                    f"{flag_of(name)} {size} is not divisible by --tensor-model-parallel-size {tp}: each process needs "
                    f"an equal part. Use a multiple of {tp}."
                )
        if all(size == most for size, most in sizes.values()):
            yield (
                "--method sheared with the teacher's own sizes prunes nothing. Use a smaller --student-hidden-size, "
                "--pruned-num-query-groups or --pruned-ffn-hidden-size."
            )

    def warn_against(self, base: ModelShape) -> Iterator[str]:
        steps = self.config.training.train_iters  # not known yet with --train-epochs
        if steps and steps <= (cut := self.change_step):
            yield f"--prune-after {cut} is not before the last of {steps} steps: this run ends before its model is cut."

    def why_no_dry_run(self) -> str | None:
        return (
            "--dry-run has no estimates for --method sheared yet. Leave it out; for the model after the cut, estimate "
            "--method ordinary at that shape."
        )

    # --- the model, and the cut -----------------------------------------------------------------------------------

    def student_shape(self, base: ModelShape) -> ModelShape:
        """What the model is cut to. A KV group goes with its query heads."""
        pruning = self.config.pruning
        groups = pruning.pruned_num_query_groups or base.num_query_groups
        assert self.config.model.student_hidden_size is not None, "student_shape() needs a validated config"
        return replace(
            base,
            hidden_size=self.config.model.student_hidden_size,
            num_query_groups=groups,
            num_attention_heads=groups * (base.num_attention_heads // base.num_query_groups),
            ffn_hidden_size=pruning.pruned_ffn_hidden_size or base.ffn_hidden_size,
        )

    def shape_of_phase(self, base: ModelShape, *, has_changed: bool) -> ModelShape:
        return self.student_shape(base) if has_changed else base

    @property
    def changes(self) -> bool:
        return True

    @property
    def change_step(self) -> int:
        return self.config.step_of(self.config.pruning.prune_after)

    def describe_change(self, student: ModelShape, trained: int) -> str:
        return (
            f"cut to hidden size {student.hidden_size}, {student.num_query_groups} KV groups, FFN width "
            f"{student.ffn_hidden_size}; trained from here on: {trained / 1e6:.1f}M parameters"
        )

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def check_continues(self, before: Method, base: ModelShape, *, path: Path, changed_at: int | None) -> str | None:
        if before.student_shape(base) == self.student_shape(base):
            return None
        return (
            f"{path} has been pruned for another shape than the flags ask for. Repeat --student-hidden-size, "
            f"--pruned-num-query-groups and --pruned-ffn-hidden-size as they were, or give --config "
            f"{path.parent / 'config.yaml'}."
        )

    def why_no_student(self, path: Path, step: int, changed_at: int | None) -> str | None:
        if changed_at is not None:
            return None
        after = self.config.pruning.prune_after
        is_known = after >= 1 or self.config.training.train_iters
        when = f"step {self.change_step}" if is_known else "that part of its steps"
        return (
            f"{path} is of step {step} of a run with --method sheared, which cuts its model in the step after {when} "
            f"(--prune-after {after:g}): there is no pruned student yet. Give a later checkpoint."
        )

    # --- what it says of itself -----------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        model = self.config.model
        return f"Structured pruning of {model.teacher} to hidden size {model.student_hidden_size}"

    def headline(self, base: ModelShape, student: ModelShape, trained: int, *, has_changed: bool) -> str:
        if has_changed:
            return super().headline(base, student, trained, has_changed=True)
        return (
            f"pruning to d {self.config.model.student_hidden_size} a model of hidden size {width_and_depth(student)}; "
            f"trained: {trained / 1e6:.1f}M parameters"
        )

    def origin(self, name: str, base: ModelShape, changed_at: int | None) -> Origin:
        pruned = f"which was pruned after {changed_at:,} steps with\nlearnt masks (arXiv 2310.06694)."
        return self._trained(name, f"{LM_LOSS_ALONE} It started as `{name}`, {pruned}", suffix="sheared")
