"""PipelineStage: what the loop, the optimizer, checkpoints and records need to know of a stage.

A method has a class of stages, such as `PairedModel` (teacher and student) or `SingleModel` (one model), and its
`Method` builds them. Whoever works on stages looks at this interface only. One optimizer step goes, on every stage:

    zero_gradients -> compose -> forward and backward of all micro-batches -> pull_back -> reduce, clip, step
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_lrc.clone.overlap import Overlap
from megatron_lrc.clone.rotation import Rotations
from megatron_lrc.clone.sites import EMBED, LAYER_SITES, LM_HEAD, HeadLayout, Site
from megatron_lrc.clone.vocab_parallel import HeadSums
from megatron_lrc.config import Config, ModelShape
from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.mcore.gpt_models import GPTModel, build_stage

NORMS, BIASES, MAPS = "norms", "biases", "maps"

#: What gradient norms are given of: norm gains, and each kind of matrix over all layers. Tied: embed.
GRADIENT_GROUPS: tuple[str, ...] = (*(site.name for site in LAYER_SITES), EMBED.name, LM_HEAD.name, NORMS)


@dataclass(frozen=True, slots=True)
class Shapes:
    """The two models, and the teacher's RoPE, which the student shares. Where there is no teacher, `teacher` is the
    student's own shape."""

    teacher: ModelShape
    student: ModelShape
    rotations: Rotations


@dataclass(frozen=True, slots=True, kw_only=True)
class MainSums(HeadSums):
    """The sums of `lm_and_kl_loss`, and the tokens that they are over."""

    tokens: Tensor


class LossSums:
    """Sums over tokens since `reset`, on the device, of what this rank holds: partial sums over the world.

    main: counted on one tensor parallel rank of the last stage. main_values: it as one tensor, fp64 [n], to be reduced.
    clone [layers, terms]: rows of this stage's layers; complete after a sum over all ranks.
    terms: names of its columns.
    """

    def __init__(self, device: torch.device, num_layers: int = 0, terms: Sequence[str] = ()):
        self.terms = terms
        self.main_values = torch.zeros(len(MainSums.names()), dtype=torch.float64, device=device)
        self.clone = torch.zeros(num_layers, len(terms), dtype=torch.float64, device=device)

    @property
    def main(self) -> MainSums:
        """Each a view, fp64."""
        return MainSums.of(self.main_values)

    def add_main(self, sums: HeadSums, token_weight: Tensor) -> None:
        """sums: those of `lm_and_kl_loss`. token_weight: of the same tokens, of any shape."""
        self.main_values += MainSums(**sums.named(), tokens=token_weight.sum()).stacked()

    def reset(self) -> None:
        self.main_values.zero_()
        self.clone.zero_()


@dataclass(frozen=True, slots=True)
class Trained:
    """One trained parameter of this rank, and its place in the whole.

    name: unique in a run, but for what is tied. key: of its global tensor in a checkpoint.
    groups: kinds of matrix in it, of GRADIENT_GROUPS; several where it is fused (`sites.select` finds each).
    split: dimension that tensor parallelism splits. None: replicated, and its gradient a partial sum over TP.
    layer: (index, number of layers), where the global tensor stacks the layers in a first dimension.
    is_gated: gate and up, split one by one. is_padded: a vocabulary, whose padding depends on TP.
    is_at_both_ends: tied: there is another copy of it on the last, or first, stage of a pipeline.
    """

    name: str
    key: str
    parameter: nn.Parameter
    groups: tuple[str, ...]
    split: int | None = None
    layer: tuple[int, int] | None = None
    is_gated: bool = False
    is_padded: bool = False
    is_at_both_ends: bool = False

    @property
    def is_copy(self) -> bool:
        """Whether it counts elsewhere, the last stage's of two tied ones: megatron-core's `shared`."""
        return getattr(self.parameter, "shared", False)


class TrainedWeights(nn.Module):
    """What DDP wraps, where that is not a whole model: a module `first`, if any, then single parameters. DDP
    fills its buckets from the last parameter to the first, so the order is that of the forward pass."""

    def __init__(self, own: Iterable[Trained], first: nn.Module | None = None):
        super().__init__()
        self.first = first
        self.own = nn.ParameterList(trained.parameter for trained in own)


class PipelineStage(nn.Module, ABC):
    """One stage: `forward(batch)` gives what the next stage gets, or the last one's loss, summed over tokens.

    chunk: which of this rank's virtual stages (0 without interleaving). A stage at an end may have no layers.
    config: what megatron-core's schedules read; its hidden_size is that of what travels between stages.
    student: the model that becomes the exported one. heads: its, for `sites.select`.
    pre_process, post_process: whether it is the whole pipeline's first stage, with the embedding; its last,
    with the LM head. megatron-core's names.
    """

    model_type = ModelType.encoder_or_decoder
    config: TransformerConfig
    settings: Config
    shapes: Shapes
    groups: Groups
    heads: HeadLayout
    sums: LossSums
    student: GPTModel
    #: Of what travels between stages, the first features that need no gradient: a frozen model's hidden state.
    frozen_width: int = 0
    #: Whom the stage tells which parameters it needs and which gradients are complete.
    overlap: Overlap = Overlap()

    def __init__(self, config: Config, groups: Groups, dtype: torch.dtype, chunk: int):
        super().__init__()
        self.settings, self.groups = config, groups
        self._dtype, self._chunk = dtype, chunk
        self.pre_process = groups.is_first_rank and chunk == 0
        self.post_process = groups.is_last_rank and chunk == config.num_chunks - 1
        self._input: Tensor | None = None

    def _build_model(
        self, shape: ModelShape, rotations: Rotations, *, is_trained: bool, config: Config | None = None
    ) -> GPTModel:
        """This stage of a model of some shape, its weights not yet set. config: of a model that is divided over the
        stages in another way than the run's configuration says."""
        return build_stage(
            config or self.settings,
            shape,
            rotations,
            dtype=self._dtype,
            chunk=self._chunk,
            is_trained=is_trained,
            is_first_stage=self.pre_process,
            is_last_stage=self.post_process,
        )

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor | None) -> None:
        """What the stage before has given, [s/tp, b, hidden_size of `config`]; called by the schedules."""
        self._input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    @property
    @abstractmethod
    def trained_module(self) -> nn.Module:
        """What DDP wraps: it has the trained parameters and no others that need gradients."""

    @abstractmethod
    def trained(self) -> Iterable[Trained]:
        """Every trained parameter, once, in an order that does not change."""

    def fixed(self) -> Iterable[Trained]:
        """What is saved beside the trained parameters, since it cannot be had otherwise."""
        return ()

    @property
    @abstractmethod
    def models(self) -> Mapping[str, GPTModel]:
        """Name in records -> model, in the order of the forward pass."""

    @abstractmethod
    def matrix_gradients(self) -> Iterator[tuple[Site, int | None, Tensor]]:
        """(site, layer or None at the ends, what backward has gathered) of each of the student's matrices."""

    @property
    def gradient_groups(self) -> tuple[str, ...]:
        return GRADIENT_GROUPS

    def zero_gradients(self) -> None:
        """Empty what gathers gradients outside the optimizer's buffers."""

    def attach(self, overlap: Overlap) -> None:
        """From now on tell `overlap` of each trained parameter before the stage reads it, and of each
        gradient that the stage itself has completed. What modules of `trained_module` read in their forward
        passes, and gradients that autograd completes, DDP's hooks see by themselves."""
        self.overlap = overlap

    def compose(self) -> None:
        """Make the student's weights from what is trained, if they are not that."""

    def compose_for_evaluation(self) -> None:
        """The same for a pass that nothing is learnt from."""
        self.compose()

    def pull_back(self) -> None:
        """Add to the gradients of what is trained what the student's weights have gathered, if need be."""

    def after_step(self, gradient_scale: Tensor) -> None:
        """Called when the optimizer has taken a step, which some steps skip: step what it does not know of.
        gradient_scale: fp64 scalar, which makes the mean gradient of a sum over tokens. Collective."""

    def record(self) -> dict[str, Any]:
        """Fields of its own in a logged step's record."""
        return {}

    def set_is_first_microbatch(self) -> None:
        """The schedules call it before the first micro-batch. The student's weights may have changed since the
        last one: their FP8 copies, if there are any, are to be made anew. A teacher's are not; its weights stay."""
        self.student.set_is_first_microbatch()

    def main_loss_scale(self) -> Tensor | float:
        """What the schedule multiplies the main loss by before backward (fp16 loss scaling; 1 otherwise)."""
        scale = self.config.grad_scale_func
        return 1.0 if scale is None else scale(torch.ones((), device=self.groups.device))


def count_trained(stages: Iterable[PipelineStage]) -> int:
    """Trained elements that this rank counts: its shards; what is replicated on one TP rank; tied, once."""
    return sum(
        trained.parameter.numel()
        for stage in stages
        for trained in stage.trained()
        if not trained.is_copy and (trained.split is not None or stage.groups.tp.rank() == 0)
    )


def run_stage(
    model: GPTModel, batch: dict[str, Tensor], hidden: Tensor | None, embedded: Tensor | None = None
) -> Tensor:
    """[s/tp, b, h]: the residual stream after this stage; after the final norm on the last.

    hidden: what the stage before has sent. embedded: on the first stage, its tokens' embeddings where they are not the
    model's own; both [s/tp, b, h].
    """
    model.set_input_tensor(hidden)
    return model(batch["tokens"], batch["position_ids"], batch.get("documents"), decoder_input=embedded)


def all_tokens(model: GPTModel, hidden: Tensor, *, is_trained: bool = True) -> Tensor:
    """[s*b, h] on every tensor parallel rank, for the losses at the head, of what a model's last stage gives:
    under sequence parallelism shards [s/tp, b, h], which are gathered.

    is_trained: then each rank's gradient, from its part of the vocabulary, is a partial sum, added up on the way back.
    """
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=is_trained)
    return hidden.flatten(0, 1)
