"""--method lrc: the student's matrices are the teacher's, multiplied by trained projections (arXiv 2505.12781).

With --open-after the projections are dropped in the middle of the run, and the matrices that they have made are trained
themselves, on the same losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from megatron_lrc.config import MATRICES, Config, ModelShape, flags_set, parse_clone_term
from megatron_lrc.methods.method import Method, Origin


class LowRankClone(Method):
    has_projections = True
    has_layer_losses = True

    # --- checks of flags ------------------------------------------------------------------------------------------

    def check_models(self) -> Iterator[str]:
        yield from super().check_models()
        yield from self._check_opening()
        projection = self.config.projection
        if projection.is_closed_form and self.config.model.untie_embeddings_and_output_weights is False:
            yield (
                f"--no-untie-embeddings-and-output-weights cannot go with --init {projection.init}, whose closed form "
                "needs a projection for the embedding and another for the LM head. Leave it out, or use --init random."
            )
        yield from self._check_released()
        if not self.config.calibrations and projection.calibration_tokens != type(projection)().calibration_tokens:
            yield (
                f"--calibration-tokens {projection.calibration_tokens} means nothing with --init {projection.init}, "
                "which reads no tokens. Leave it out, or use --init channel, pca or ridge, or "
                "--clone-normalization token."
            )

    def _check_released(self) -> Iterator[str]:
        is_meant, path = self.config.projection.init == "released", self.config.projection.released_checkpoint
        if path is not None and not is_meant:
            yield f"--released-checkpoint {path} is only for --init released. Add that, or leave it out."
        elif is_meant and path is None:
            yield "--init released needs --released-checkpoint, the directory with the zoom matrices."

    def _check_opening(self) -> Iterator[str]:
        after = self.config.projection.open_after
        if after is None:
            if given := flags_set(self.config, {"open_matrices", "open_lr"}):
                yield f"{given} needs --open-after, which says when. Set that too, or leave it out."
        elif after >= 1 and after != int(after):
            yield f"--open-after {after:g} is no number of steps. Give a whole one, or a fraction below 1."

    def check_against(self, base: ModelShape) -> Iterator[str]:
        yield from super().check_against(base)
        width, projection = self.config.model.student_hidden_size, self.config.projection
        assert width is not None, "validate() comes first"
        if projection.is_closed_form and width > base.hidden_size:
            yield (
                f"--student-hidden-size {width} is above the teacher's {base.hidden_size}: --init {projection.init} "
                f"takes that many orthogonal directions out of {base.hidden_size}. Use at most {base.hidden_size}."
            )
        if self._is_tied(base) and not base.is_tied:
            yield (
                "--no-untie-embeddings-and-output-weights cannot tie the student: the teacher's embedding and LM head "
                "are two matrices, so what one projection makes of them differs. Leave it out."
            )
        count = self.student_shape(base).num_layers
        for text in self.config.loss.clone_terms:
            _, ranges = parse_clone_term(text)
            if any(layers[-1] >= count for layers in ranges or []):
                yield (
                    f"--clone-terms {text} names a layer that the student does not have: its {count} layers are "
                    f"0-{count - 1}."
                )

    def check_new(self, base: ModelShape) -> Iterator[str]:
        if path := self.config.projection.released_checkpoint:
            from megatron_lrc.hf.released_projections import ReleasedProjections  # loads torch

            ReleasedProjections(path, base, self.student_shape(base))
        yield from super().check_new(base)

    def warn_against(self, base: ModelShape) -> Iterator[str]:
        yield from super().warn_against(base)
        width = self.config.model.student_hidden_size
        if self.config.projection.init == "random" and width is not None and width >= base.hidden_size:
            yield (
                f"--student-hidden-size {width} is not below the teacher's {base.hidden_size}: the student will not be "
                "smaller."
            )
        init = self.config.projection.init
        if base.has_norms_after and self.config.projection.is_closed_form and init != "channel":
            yield (
                f"--init {init} is far off where the teacher norms what its blocks give: through such norms "
                "only --init channel passes exactly (docs/models.md)."
            )

    # --- the student, and its losses ------------------------------------------------------------------------------

    def _is_tied(self, base: ModelShape) -> bool:
        is_given = self.config.model.untie_embeddings_and_output_weights is not None
        return super()._is_tied(base) and (is_given or not self.config.projection.is_closed_form)

    def own_matrices(self, *, has_changed: bool) -> frozenset[str]:
        if not has_changed:
            return frozenset()
        return frozenset(("gate", "up", "down") if self.config.projection.open_matrices == "mlp" else MATRICES)

    def terms_of(self, layer: int) -> set[str]:
        loss = self.config.loss
        terms = map(parse_clone_term, loss.clone_terms if loss.alpha else [])
        return {term for term, ranges in terms if ranges is None or any(layer in layers for layers in ranges)}

    # --- the opening ----------------------------------------------------------------------------------------------

    @property
    def changes(self) -> bool:
        return self.config.projection.open_after is not None

    @property
    def change_step(self) -> int | None:
        after = self.config.projection.open_after
        return None if after is None else self.config.step_of(after)

    @property
    def changes_at_once(self) -> bool:
        return self.config.projection.open_after == 0

    def config_of_phase(self, *, has_changed: bool) -> Config:
        open_lr = self.config.projection.open_lr
        if not has_changed or open_lr is None:
            return self.config
        return replace(self.config, optimizer=replace(self.config.optimizer, lr=open_lr))

    def describe_change(self, student: ModelShape, trained: int) -> str:
        what = {"mlp": "the MLPs", "all": "all layers and both ends"}[self.config.projection.open_matrices]
        return (
            f"projections of {what} dropped, the student's own matrices are trained from here on; trained: "
            f"{trained / 1e6:.1f}M parameters"
        )

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def check_continues(self, before: Method, base: ModelShape, *, path: Path, changed_at: int | None) -> str | None:
        then, now = before.config.projection, self.config.projection
        if changed_at is None or (now.open_after is not None and now.open_matrices == then.open_matrices):
            return None
        return (
            f"{path} holds a student that was opened after step {changed_at}, and stays so. Repeat "
            f"--open-after {then.open_after:g} and --open-matrices {then.open_matrices}."
        )

    def why_not_resumed(self, path: Path, before: Config) -> str | None:
        if self.config.loss.is_relative and not before.loss.is_relative:
            return (
                f"{path} was made without --clone-normalization {self.config.loss.clone_normalization}, or with "
                f"--alpha 0: it lacks what that divides by. Start a new run with --pretrained-checkpoint {path}, or go "
                "on with --clone-normalization none."
            )
        return None

    def why_no_start(self, path: Path, changed_at: int | None) -> str | None:
        if changed_at is None:
            return None
        return (
            f"--pretrained-checkpoint {path} holds a student that was opened after step {changed_at}: it has "
            "matrices that no projection makes, and cannot start another clone. Continue that run with --load, or "
            "export it with tools/convert_to_hf.py and train the result with --method ordinary --student."
        )

    # --- what it says of itself -----------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        model = self.config.model
        opened = ", opened at once" if self.changes_at_once else ""
        return f"Low-Rank Clone of {model.teacher} to hidden size {model.student_hidden_size}{opened}"

    def trained_where(self, *, has_changed: bool) -> str:
        return ", opened" if has_changed else " in projections and norm gains"

    def describe_trained(self, count: Callable[[bool], int]) -> Iterator[str]:
        if self.changes_at_once:
            yield f"trained: {count(True) / 1e6:.1f}M parameters of the student's own, from the first step on"
            return
        yield f"trained: {count(False) / 1e6:.1f}M parameters in projections and norm gains"
        if self.changes:
            yield (
                f"trained from step {self.change_step} on: {count(True) / 1e6:.1f}M parameters, of which memory and "
                "disk space below are"
            )

    def origin(self, name: str, base: ModelShape, changed_at: int | None) -> Origin:
        if changed_at is None:
            width = base.hidden_size
            story = (
                f"made from `{name}` (hidden size {width})\nwith Low-Rank Clone (LRC, arXiv 2505.12781) by "
                "megatron_lrc.\n\nEvery weight matrix is the teacher's, multiplied by a trained projection of "
                f"{width} x {self.config.model.student_hidden_size};\nnothing but the projections and the norm gains "
                "was trained. Everything else is the teacher's."
            )
            return Origin("LRC", story, "The teacher's licence applies.", ("low-rank-clone",))
        opened = "those of the MLPs" if self.config.projection.open_matrices == "mlp" else "all of them"
        if changed_at == 0:
            story = (
                f"its\nmatrices began as those of `{name}`, multiplied by projections (`--init "
                f"{self.config.projection.init}`; Low-Rank Clone,\narXiv 2505.12781), and {opened} were trained."
            )
            return self._trained(name, story, suffix="LRC-opened")
        story = (
            f"for\n{changed_at:,} steps its matrices were those of `{name}`, multiplied by trained projections "
            f"(Low-Rank Clone, arXiv\n2505.12781); from there on {opened} were trained themselves, on the same losses."
        )
        return self._trained(name, story, suffix="LRC-opened")
