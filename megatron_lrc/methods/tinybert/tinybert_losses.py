"""TinyBERT's losses between teacher and student (`--method tinybert`), and where they attach.

arXiv 1909.10351, equations 7 to 9: attention scores of each layer; hidden states after each layer and
embeddings, the student's through a learned linear map to the teacher's width. Each layer has its own map, on its
pipeline stage (the paper shares one among the layers). Layers are compared in pairs; a student with fewer layers is
compared with those that its shape names, the paper's layer map.

Notation: s sequence, b micro-batch, D teacher hidden, d student hidden; `/tp` split.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lrc.clone.losses import CarryLoss, CloneLoss, squared_errors
from megatron_lrc.clone.seeds import generator_of
from megatron_lrc.clone.sites import Site
from megatron_lrc.config import TINYBERT_TERMS
from megatron_lrc.mcore.gpt_models import layers_of
from megatron_lrc.mcore.stages import MAPS, Trained
from megatron_lrc.methods.lrc.layer_losses import LayerLosses, TwoModels
from megatron_lrc.methods.tinybert.attention_loss import AttentionLoss

EMBEDDING, HIDDEN, ATTENTION = range(len(TINYBERT_TERMS))

#: What is compared of a hidden state: all of it, which each rank has whole of its tokens.
_HIDDEN_STATE = Site("hidden state", "output", "", 1)


class TinyBertLosses(LayerLosses):
    """Those of one stage."""

    terms = TINYBERT_TERMS
    gradient_groups = (MAPS,)

    def __init__(self, stage: TwoModels):
        super().__init__(stage)
        self._token_weight: Tensor
        self._teachers: dict[tuple[int, int], Any] = {}  # what the student has yet to meet, by (layer, term)
        self.maps = nn.ParameterDict()
        teachers = dict(layers_of(stage.teacher))
        if stage.pre_process:
            self._compare_hidden(EMBEDDING, 0, stage.teacher.embedding, stage.student.embedding)
        for index, layer in layers_of(stage.student):
            teacher = teachers[stage.shapes.student.teacher_layer(index)]
            self._compare_attention(index, teacher, layer)
            self._compare_hidden(HIDDEN, index, teacher, layer)

    def begin(self, token_weight: Tensor) -> None:
        self._token_weight = token_weight

    def end(self, student_hidden: Tensor) -> Tensor:
        assert not self._teachers, "a student layer did not meet its teacher's activation"
        return student_hidden

    def forget(self) -> None:
        self._teachers.clear()

    def trained(self) -> Iterator[Trained]:
        """The maps: replicated over TP, where each rank's gradient is that of its own tokens."""
        for name, parameter in self.maps.items():
            yield Trained(f"maps.{name}", f"maps.{name}", parameter, (MAPS,))

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Each map ~ N(0, 1 / sqrt(d)), from a seed of its name: any layout starts the same."""
        for name, parameter in self.maps.items():
            drawn = torch.randn(parameter.shape, generator=generator_of(seed, f"maps.{name}"))
            parameter.copy_(drawn * parameter.shape[0] ** -0.5)

    def _compare_hidden(self, term: int, layer: int, teacher: nn.Module, student: nn.Module) -> None:
        shapes = self._stage.shapes
        name = "embedding" if term == EMBEDDING else f"hidden_{layer}"
        weight = next(student.parameters())
        size = (shapes.student.hidden_size, shapes.teacher.hidden_size)
        self.maps[name] = nn.Parameter(torch.zeros(size, dtype=weight.dtype, device=weight.device))
        teacher.register_forward_hook(partial(self._keep_hidden, term, layer))
        student.register_forward_hook(partial(self._attach_hidden, term, layer, name))

    def _keep_hidden(self, term: int, layer: int, module: nn.Module, inputs: tuple, output: Any) -> None:
        self._teachers[layer, term] = output[0] if isinstance(output, tuple) else output

    def _attach_hidden(self, term: int, layer: int, name: str, module: nn.Module, inputs: tuple, output: Any) -> Any:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output  # [s/tp, b, d]
        target = self._teachers.pop((layer, term))  # [s/tp, b, D]
        tp, token_weight = self._stage.groups.tp, self._token_weight
        if self._stage.student.config.sequence_parallel:
            token_weight = token_weight.chunk(tp.size())[tp.rank()]
        mapped, places = hidden @ self.maps[name], ((_HIDDEN_STATE,), self._stage.heads, tp.size())
        with torch.no_grad():
            errors = squared_errors(mapped, target, *places)[..., 0]
            self._stage.sums.clone[layer, term] += (token_weight * errors).sum(dtype=torch.float64)
        mapped = CloneLoss.apply(mapped, target, token_weight.unsqueeze(-1), *places, self._scale)
        attached = CarryLoss.apply(hidden, mapped)
        return (attached, *output[1:]) if isinstance(output, tuple) else attached

    @property
    def _scale(self) -> Tensor | float:
        return self._stage.settings.loss.alpha * self._stage.main_loss_scale()

    def _compare_attention(self, layer: int, teacher: nn.Module, student: nn.Module) -> None:
        cores = [model.self_attention.core_attention for model in (teacher, student)]
        cores[0].register_forward_pre_hook(partial(self._keep_queries_and_keys, layer))
        cores[1].register_forward_pre_hook(partial(self._attach_attention, layer))

    def _keep_queries_and_keys(self, layer: int, module: nn.Module, inputs: tuple) -> None:
        self._teachers[layer, ATTENTION] = inputs[:2]

    def _attach_attention(self, layer: int, module: nn.Module, inputs: tuple) -> tuple:
        queries, keys, *others = inputs  # [s, b, heads/tp, head_dim], after RoPE
        shape, teachers = self._stage.shapes.student, self._teachers.pop((layer, ATTENTION))
        how = (shape.num_attention_heads, self._scale, shape.window(layer), shape.attention_multiplier)
        queries, keys, loss = AttentionLoss.apply(queries, keys, *teachers, self._token_weight, *how)
        self._stage.sums.clone[layer, ATTENTION] += loss
        return (queries, keys, *others)
