"""PairedModel: one pipeline stage of the teacher and of the student, and what of the student is trained.

What travels between stages is [teacher_hidden, student_hidden] side by side; the configuration that
megatron-core's schedules see has hidden_size D + d, so their buffers fit. Back travels the student's gradient
alone (`mcore/messages.py`). The teacher runs first, without autograd; losses between layers are attached as the
student meets what it has left behind (`layer_losses.py`).

Notation: s sequence, b micro-batch, D teacher hidden, d student hidden; `/tp` split over tensor parallelism.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from megatron_lrc.checkpoints import layout
from megatron_lrc.clone.kept_rows import UNITS, KeptRows
from megatron_lrc.clone.overlap import Overlap
from megatron_lrc.clone.projections import ClonedWeight, Projections, accumulate_in_fp32, gradient_of, zero_gradient
from megatron_lrc.clone.sharing import Sharing
from megatron_lrc.clone.sites import (
    EMBED,
    LAYER_SITES,
    LM_HEAD,
    WRITER_BEFORE,
    HeadLayout,
    Site,
    compose,
    projection_names,
    select,
)
from megatron_lrc.clone.vocab_parallel import HeadLossSettings, lm_and_kl_loss
from megatron_lrc.config import MATRICES, Config, parse_divergence
from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.mcore.gpt_models import (
    GPTModel,
    embedding_factor,
    layers_of,
    norm_after,
    norm_gains,
    residual_readers,
    tie_ends,
    vocabulary_shard,
)
from megatron_lrc.mcore.stages import (
    BIASES,
    GRADIENT_GROUPS,
    NORMS,
    LossSums,
    Shapes,
    Trained,
    TrainedWeights,
    all_tokens,
    run_stage,
)
from megatron_lrc.mcore.student_stages import config_of_student
from megatron_lrc.methods.lrc.layer_losses import LayerLosses, LayerLossesFactory, TwoModels
from megatron_lrc.methods.lrc.missing_parts import MissingParts
from megatron_lrc.methods.lrc.own_matrices import give_up_memory, own_parameters, renew_parameters, replacement


class PairedModel(TwoModels):
    """One stage of both models. `projections` makes the student's weights and is what an optimizer trains.

    own: the student's matrices, by name, that are its own and trained themselves; the others are composed.
    layer_losses: makes the losses between the two models' layers.
    """

    def __init__(
        self,
        config: Config,
        shapes: Shapes,
        groups: Groups,
        dtype: torch.dtype,
        chunk: int = 0,
        own: frozenset[str] = frozenset(),
        *,
        layer_losses: LayerLossesFactory = LayerLosses,
    ):
        super().__init__(config, groups, dtype, chunk)
        self.shapes = shapes
        self.teacher = self._build_model(shapes.teacher, shapes.rotations, is_trained=False)
        divided = config_of_student(config, shapes.teacher, shapes.student)
        self.student = self._build_model(shapes.student, shapes.rotations, is_trained=True, config=divided)
        # What the schedules read: the student's settings, with room for both hidden states between stages.
        self.config = copy.copy(self.student.config)
        self.config.hidden_size = shapes.teacher.hidden_size + shapes.student.hidden_size
        ends = [self.student.embedding] if self.pre_process else []
        for module in (*ends, *(layer for _, layer in layers_of(self.student))):
            module.register_forward_pre_hook(self._await_matrices_of)
        self.frozen_width = shapes.teacher.hidden_size
        self.heads = HeadLayout.of(shapes.teacher)
        self.layer_losses = layer_losses(self)
        self.missing = self._find_missing()
        self.sums = LossSums(groups.device, shapes.student.num_layers, self.layer_losses.terms)
        self.vocabulary = vocabulary_shard(shapes.teacher, groups.tp)
        self._is_to_compose = False  # in the next forward pass
        #: By its layers, what the student has of the teacher's, where that is not all of them.
        self.kept: dict[int, KeptRows] = {}
        self._choose_trained(own)

    # --- construction -----------------------------------------------------------------------------

    def _choose_trained(self, own: frozenset[str]) -> None:
        """Make the projections, and say which of the student's parameters are its own."""
        self.own = own
        self.overlap = Overlap()
        self.cloned_weights = self._pair_weights()
        targets = self.layer_losses.target_names
        has_embedding = self.pre_process or (self.post_process and self.shapes.student.is_tied)
        layers = [index for index, _ in layers_of(self.student)]
        names = projection_names(layers, has_embedding, self._has_own_head())
        fixed = [name for name in targets if name.rpartition(".")[2] in own]
        self.projections = Projections(
            [name for name in names if name.rpartition(".")[2] not in own or name in fixed],
            norm_gains(self.student),
            fixed=fixed,
            teacher_size=self.shapes.teacher.hidden_size,
            student_size=self.shapes.student.hidden_size,
            tp_group=self.groups.tp,
            dtype=self._dtype,
            device=self.groups.device,
            sharing=Sharing(self.groups.sharing, self._composed_matrices()),
            gain_offset=self.shapes.student.gain_offset,
        )
        for name in targets:
            self.projections.add_target(name, is_detached=self.settings.loss.detach_clone_targets)
        if self._looks_up:
            self.projections.add_target(EMBED.name, is_detached=False)
        of_student = own_parameters(self.student, self.shapes.student, own)
        self._own_parameters = [*of_student, *self.layer_losses.trained()]
        self._trained_weights = TrainedWeights(self._own_parameters, self.projections)
        self._set_trainable()

    @torch.no_grad()
    def open(self, own: frozenset[str]) -> None:
        """From now on these of the student's matrices are its own, with the values that they have now. What
        trains is new, and so has to be whatever trains it."""
        self._compose_now()
        self.projections.sharing.await_matrices()
        before = self.projections
        if self._looks_up and EMBED.name in own:
            embedding = self.student.embedding.word_embeddings
            rows = compose(EMBED, self.teacher.embedding.word_embeddings.weight, before.full(EMBED.name))
            embedding.weight = replacement(embedding.weight, rows)
        renew_parameters(self.student)
        tie_ends(self.student, self.shapes.student)
        self._choose_trained(own)
        for name, _ in self.projections.named_matrices():
            self.projections.set_matrix(name, before.full(name))

    @property
    def _looks_up(self) -> bool:
        """Whether the student's embeddings are the teacher's, projected. A tied student's matrix is there anyway."""
        return self.pre_process and not self.shapes.student.is_tied and EMBED.name not in self.own

    def _has_own_head(self) -> bool:
        return self.post_process and not self.shapes.student.is_tied

    def _pair_weights(self) -> list[ClonedWeight]:
        """Every student matrix on this stage, beside the teacher's and the name of its projection."""
        weights = []

        def pair(projection: str, site: Site, teacher: nn.Module, student: nn.Module, **how: bool) -> None:
            old, new = (model.get_parameter(f"{site.linear}.weight") for model in (teacher, student))
            weights.append(ClonedWeight(projection, site, old, new, self.heads, is_own=site.name in self.own, **how))

        if self._looks_up:
            give_up_memory(self.student.embedding.word_embeddings)
        if self.pre_process:
            pair(EMBED.name, EMBED, self.teacher, self.student, is_looked_up=self._looks_up)
        student_layers = dict(layers_of(self.student))
        for index, teacher_layer in self.teachers_of_student():
            for site in LAYER_SITES:
                pair(f"layers.{index}.{site.name}", site, teacher_layer, student_layers[index])
        if self._has_own_head():
            pair(LM_HEAD.name, LM_HEAD, self.teacher, self.student)
        elif self.post_process and not self.pre_process:
            pair(EMBED.name, LM_HEAD, self.teacher, self.student)
        return weights

    def teachers_of_student(self) -> Iterator[tuple[int, nn.Module]]:
        """(global 0-based index of a layer of the student here, the teacher's layer that it is made of)."""
        teacher_layers = dict(layers_of(self.teacher))
        for index, _ in layers_of(self.student):
            yield index, teacher_layers[self.shapes.student.teacher_layer(index)]

    def _find_missing(self) -> MissingParts:
        own = dict(layers_of(self.student))
        pairs = [(of_teacher, own[index]) for index, of_teacher in self.teachers_of_student()]
        kept = {id(of_teacher) for of_teacher, _ in pairs}
        skipped = (layer for _, layer in layers_of(self.teacher) if id(layer) not in kept)
        return MissingParts(skipped, pairs, self.shapes.teacher)

    def readings(self) -> Iterator[tuple[str, nn.Module]]:
        """Where the student reads its residual stream here: (name of the norm there, the module that the teacher gives
        its own stream to)."""
        readers = dict(residual_readers(self.teacher))
        for name, _ in residual_readers(self.student):
            yield name, readers[self.shapes.student.teacher_name(name)]

    def teacher_gains(self) -> dict[str, Tensor]:
        """By the name of the student's norm, what the teacher's multiplies by, [D] in fp32 or better."""
        stored, offset = norm_gains(self.teacher), self.shapes.teacher.gain_offset
        of_teacher = {name: stored[self.shapes.student.teacher_name(name)] for name in norm_gains(self.student)}
        return {
            name: gain.detach().to(torch.promote_types(gain.dtype, torch.float32)) + offset
            for name, gain in of_teacher.items()
        }

    def norms_after(self) -> Iterator[tuple[str, nn.Module]]:
        """(name of a norm of what the student's blocks give, the teacher's norm there)."""
        for index, layer in self.teachers_of_student():
            for name in WRITER_BEFORE:
                if norm := norm_after(layer, name):
                    yield f"layers.{index}.{name}", norm

    @property
    def embedding_ratio(self) -> float:
        """What the teacher's embeddings are multiplied by, over what the student's are."""
        factors = [embedding_factor(shape, self._dtype) for shape in (self.shapes.teacher, self.shapes.student)]
        return factors[0] / factors[1]

    def _set_trainable(self) -> None:
        """The teacher is frozen. The student's matrices gather gradients, composed ones by themselves and its
        own in DDP's buffers; unless all are its own, its biases are the teacher's, unchanged."""
        self.teacher.requires_grad_(False)
        composed = {id(matrix) for matrix in self._composed_matrices()}
        trained = {id(parameter) for parameter in self._trained_weights.parameters()}
        for parameter in self.student.parameters():
            parameter.requires_grad_(id(parameter) in composed or id(parameter) in trained)
        for matrix in self._composed_matrices():
            accumulate_in_fp32(matrix)

    def _composed_matrices(self) -> Iterable[nn.Parameter]:
        """Of the student: each once, also where several sites are fused in it."""
        return {id(weight.student): weight.student for weight in self.cloned_weights if weight.is_composed}.values()

    # --- what is trained --------------------------------------------------------------------------

    @property
    def trained_module(self) -> nn.Module:
        return self._trained_weights

    def trained(self) -> Iterator[Trained]:
        """Every P, in shards of its rows, the norm gains, and the student's own parameters."""
        yield from (each for each in self._projections() if each.parameter.requires_grad)
        for name, gain in self.projections.named_norms():
            yield Trained(name, layout.NORMS + name, gain, (NORMS,))
        yield from self._own_parameters

    def fixed(self) -> Iterator[Trained]:
        """Projections that generate nothing any more but the clone loss's targets; constants of the losses; which rows
        are kept."""
        yield from (each for each in self._projections() if not each.parameter.requires_grad)
        yield from self.layer_losses.fixed()
        for index, kept in self.kept.items():
            for unit in UNITS:
                name = layout.kept_name(index, unit)
                yield Trained(name, name, nn.Parameter(kept.of(unit), requires_grad=False), ())

    def _projections(self) -> Iterator[Trained]:
        for name, matrix in self.projections.named_matrices():
            group = name.rpartition(".")[2]
            is_tied = group == EMBED.name and self.shapes.student.is_tied
            yield Trained(name, layout.PROJECTIONS + name, matrix, (group,), split=0, is_at_both_ends=is_tied)

    @property
    def gradient_groups(self) -> tuple[str, ...]:
        has_biases = self.shapes.student.has_qkv_bias and self.own.issuperset(MATRICES)
        return (*GRADIENT_GROUPS, *[BIASES] * has_biases, *self.layer_losses.gradient_groups)

    @property
    def models(self) -> Mapping[str, GPTModel]:
        return {"teacher": self.teacher, "student": self.student}

    def matrix_gradients(self) -> Iterator[tuple[Site, int | None, Tensor]]:
        for weight in self.cloned_weights:
            has_weight = not weight.is_looked_up
            grad = gradient_of(weight.student if has_weight else self.projections.target(weight.projection))
            if grad is not None:
                layer = int(weight.projection.split(".")[1]) if weight.site in LAYER_SITES else None
                yield weight.site, layer, select(weight.site, grad, self.heads)

    def zero_gradients(self) -> None:
        for matrix in self._composed_matrices():
            zero_gradient(matrix)
        self.overlap.begin_step()

    def attach(self, overlap: Overlap) -> None:
        super().attach(overlap)
        self.projections.attach(overlap, self.cloned_weights)

    def compose(self) -> None:
        """W_S <- f(W_T, P), but for what is the student's own."""
        if self.overlap.composes_behind_teacher:
            self._is_to_compose = True
        else:
            self._compose_now()

    def compose_for_evaluation(self) -> None:
        self._compose_now()

    def _compose_now(self) -> None:
        self._is_to_compose = False
        self.projections.compose(self.cloned_weights)
        for trained in self.trained():  # gains and the student's own, which the forward pass reads
            self.overlap.parameter_is_needed(trained.parameter)

    def _await_matrices_of(self, module: nn.Module, _: tuple) -> None:
        """What other replicas compose of the student arrives in the order in which it is read."""
        self.projections.sharing.await_matrices(module.parameters())

    def pull_back(self) -> None:
        """dP += f^T(W_T, dW_S). Those of norm gains and of what is the student's own are there already."""
        self.projections.pull_back(self.cloned_weights)

    # --- forward ----------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """batch: tokens, labels, loss_mask, position_ids, each [b, s]; `documents` of `find_documents` if wanted.
        Gives [s/tp, b, D + d] for the next stage; on the last stage the LM + KL loss summed over tokens."""
        token_weight = batch["loss_mask"].t().contiguous()
        self.layer_losses.begin(token_weight)
        teacher_in, student_in = self._split_input()
        embedded = None  # the teacher's [s/tp, b, D], then the student's [s/tp, b, d]
        with torch.no_grad():
            if self._looks_up:
                embedded = self.teacher.embedding(batch["tokens"], batch["position_ids"])
            teacher_hidden = run_stage(self.teacher, batch, teacher_in, embedded)
        if self._is_to_compose:
            self._compose_now()
        if embedded is not None:
            if (ratio := self.embedding_ratio) != 1.0:  # the teacher's factor is in there, and the student has its own
                embedded = embedded / ratio
            embedded = embedded @ self.projections.target(EMBED.name)
        student_hidden = self.layer_losses.end(run_stage(self.student, batch, student_in, embedded))
        if not self.post_process:
            return torch.cat([teacher_hidden, student_hidden], dim=-1)
        return self._lm_and_kl(teacher_hidden, student_hidden, batch["labels"], token_weight)

    def forward_teacher(self, batch: dict[str, Tensor]) -> Tensor:
        """The teacher alone, for calibration. Inputs and outputs as of `forward`, but the student's part is what
        `missing` has added up."""
        teacher_in, missing_in = self._split_input()
        self.missing.begin(missing_in)
        self.layer_losses.begin(batch["loss_mask"].t())
        with torch.no_grad():
            hidden = run_stage(self.teacher, batch, teacher_in)
        self.layer_losses.forget()
        if self.post_process:
            return hidden.new_zeros(())
        missing = hidden.new_zeros(*hidden.shape[:2], self.shapes.student.hidden_size) + self.missing.added
        return torch.cat([hidden, missing.to(hidden.dtype)], dim=-1)

    def _split_input(self) -> tuple[Tensor | None, Tensor | None]:
        if self.pre_process:
            return None, None
        assert self._input is not None
        width = self.shapes.teacher.hidden_size
        return self._input[..., :width].detach(), self._input[..., width:]

    def _lm_and_kl(
        self, teacher_hidden: Tensor, student_hidden: Tensor, labels: Tensor, token_weight: Tensor
    ) -> Tensor:
        self.projections.sharing.await_matrices()
        teacher_tokens = all_tokens(self.teacher, teacher_hidden, is_trained=False)  # [s*b, D]
        loss, sums = lm_and_kl_loss(
            all_tokens(self.student, student_hidden),  # [s*b, d]
            teacher_tokens,
            self.student.output_layer.weight,
            self.teacher.output_layer.weight,
            labels.t().flatten(),
            token_weight.flatten(),
            shard=self.vocabulary,
            settings=HeadLossSettings(
                lm=self.settings.loss.lm_weight,
                kl=self.settings.total_kl_weight,
                temperature=self.settings.loss.kl_temperature,
                beta=parse_divergence(self.settings.loss.kl_divergence),
                top_k=self.settings.loss.kl_top_k or 0,
                chunk_tokens=self.settings.loss.chunk_tokens(on_cuda=student_hidden.is_cuda),
                loss_scale=self.main_loss_scale(),
                logits_scaling=self.shapes.student.logits_scaling,
                logits_soft_cap=self.shapes.student.logits_soft_cap,
            ),
            is_embedding=self.pre_process and self.shapes.student.is_tied,
        )
        if self.groups.tp.rank() == 0:
            self.sums.add_main(sums, token_weight)
        return loss
