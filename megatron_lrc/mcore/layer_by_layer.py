"""Logits of a whole model by megatron-core's own layers, in one process, one layer in memory at a time.

One decoder layer and the final norm are built as `gpt_models.py` builds them for training, and every layer's weights
take their turn in them. No torchrun: a world of one process is made for the time of the computation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from megatron_lrc.checkpoints.layout import QK_NORMS
from megatron_lrc.clone.products import ROWS_AT_ONCE
from megatron_lrc.clone.rotation import Rotations
from megatron_lrc.clone.sites import EMBED, LAYER_SITES, LM_HEAD, HeadLayout, select
from megatron_lrc.config import Config, ModelShape
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.compat import scale_rotation
from megatron_lrc.mcore.gpt_models import build_stage, cap_logits, embedding_factor, layers_of, norm_gains
from megatron_lrc.mcore.rotary import with_frequencies

_NORMS = {
    "input": "input_layernorm.weight",
    "after_attention": "self_attn_bda.norm.weight",
    "post": "pre_mlp_layernorm.weight",
    "after_mlp": "mlp_bda.norm.weight",
    **{f"{site}{kind}": f"self_attention.{site}_layernorm.weight" for site in "qk" for kind in QK_NORMS},
}
#: Tokens that pass a layer together, in whole sequences.
TOKENS_AT_ONCE = 4096


class LayerByLayer:
    """Takes a model's weights one after another, in the order of the forward pass, and computes on the way.

    tokens: int64 [b, s]. rotations: those for s tokens. Memory: a layer in `dtype`, and of a tied model the embedding
    as it was given. Needs megatron-core's process groups: `layer_by_layer` makes both.
    """

    def __init__(self, shape: ModelShape, rotations: Rotations, tokens: Tensor, dtype: torch.dtype):
        config = Config()
        config.training.seq_length = tokens.shape[1]
        config.compute.transformer_impl = "local"  # one module for each weight
        self.shape, self.rotations, self.tokens, self.dtype = shape, rotations, tokens, dtype
        self._model = build_stage(
            config,
            # The ends are computed here, a part at a time; what differs from layer to layer is set as they come.
            replace(shape, num_layers=1, vocab_size=1, windowed_layers=(), unrotated_layers=()),
            Rotations(rotations.full, rotations.full),
            dtype=dtype,
            chunk=0,
            is_trained=False,
            is_first_stage=False,
            is_last_stage=True,
        )
        ((_, layer),) = layers_of(self._model)
        self._layer: Any = layer
        self._final_norm: Any = self._model.decoder.final_layernorm
        self._places = self._places_of_layer()
        self._scope, self._filled = "", set[str]()
        self._hidden = torch.empty(0)
        self._tied_head: Tensor | None = None
        self._logits: Tensor | None = None

    @torch.no_grad()
    def add(self, key: str, weight: Tensor) -> None:
        """The next weight, whole and in Hugging Face's order of rows, in any dtype.

        key: `embed`, then `layers.{i}.` with q, k, v, o, gate, up, down and what the shape says of norms and biases in
        any order, then `final`, and `lm_head` unless the model is tied.
        """
        scope, _, name = key.rpartition(".")
        if scope != self._scope:
            self._run_layer()
            self._scope = scope
        if scope:
            self._fill(name, weight)
        elif name == EMBED.name:
            gain = norm_gains(self._model)["final"]
            embedded = weight[self.tokens.t()].to(gain.device, self.dtype)
            self._hidden = embedded * embedding_factor(self.shape, self.dtype)  # [s, b, h]
            self._tied_head = weight if self.shape.is_tied else None
        elif name == "final":
            self._final_norm.weight.copy_(weight)
            if self._tied_head is not None:
                self._finish(self._tied_head)
        else:
            assert name == LM_HEAD.name and not self.shape.is_tied, key
            self._finish(weight)

    @property
    def logits(self) -> Tensor:
        """[b, s, v] on the CPU, in `dtype`, once all weights have been added."""
        assert self._logits is not None, f"no weight came after {self._scope or EMBED.name}"
        return self._logits

    def _places_of_layer(self) -> dict[str, Tensor]:
        """Name of each weight of a layer -> where it goes, a view of a parameter."""
        heads, layer, shape = HeadLayout.of(self.shape), self._layer, self.shape
        places = {site.name: select(site, layer.get_parameter(f"{site.linear}.weight"), heads) for site in LAYER_SITES}
        if shape.has_qkv_bias:
            for site in LAYER_SITES[:3]:
                places[f"{site.name}_bias"] = select(site, layer.get_parameter(f"{site.linear}.bias"), heads)
        norms = [*shape.norms, *["q_norm", "k_norm"] * shape.has_qk_norm]
        norms += ["q_wide_norm", "k_wide_norm"] * shape.has_wide_qk_norm
        return places | {name: layer.get_parameter(_NORMS[name]) for name in norms}

    def _fill(self, name: str, weight: Tensor) -> None:
        if name not in self._places:
            assert not weight.any(), f"{self._scope}.{name} is not zero, and the model has no place for it"
            return
        place = self._places[name]
        place.copy_(weight.view(place.shape))
        self._filled.add(name)

    def _run_layer(self) -> None:
        if not self._scope:
            return
        assert self._filled == set(self._places), f"{self._scope} lacks {set(self._places) - self._filled}"
        self._hidden = self._pass_layer(self._hidden)
        self._filled = set()

    def _pass_layer(self, hidden: Tensor) -> Tensor:
        """[s, b, h], of the layer whose weights are there."""
        layer = int(self._scope.rpartition(".")[2])
        self._layer.self_attention.core_attention.window = self.shape.window(layer)
        rotation = self.rotations.of_layer(self.shape, layer)
        scale_rotation(self._layer.self_attention, rotation.factor)
        table = with_frequencies(self._model.rotary_pos_emb, rotation.frequencies)
        angles = table.get_emb(len(hidden)) if self.shape.is_rotated(layer) else None  # [s, 1, 1, c]
        parts = hidden.split(max(1, TOKENS_AT_ONCE // hidden.shape[0]), dim=1)
        passed = [self._layer(part, attention_mask=None, rotary_pos_emb=angles)[0] for part in parts]
        return torch.cat(passed, dim=1)

    def _finish(self, head: Tensor) -> None:
        """All layers have been passed, and the final norm has its gain. head: [v, h]."""
        hidden = self._final_norm(self._hidden)
        blocks = (rows.to(hidden.device, self.dtype) for rows in head.split(ROWS_AT_ONCE))
        logits = torch.cat([F.linear(hidden, block).cpu() for block in blocks], dim=-1).transpose(0, 1)
        self._logits = cap_logits(logits.div_(self.shape.logits_scaling), self.shape)


@contextmanager
def layer_by_layer(
    shape: ModelShape, rotations: Rotations, tokens: Tensor, dtype: torch.dtype = torch.float32
) -> Iterator[LayerByLayer]:
    """A LayerByLayer, in `world_of_one`."""
    with world_of_one():
        yield LayerByLayer(shape, rotations, tokens, dtype)


@contextmanager
def world_of_one() -> Iterator[None]:
    """megatron-core's process groups of a world of one, whatever torchrun's environment says. Groups that there are
    already are used; what is made here is gone again afterwards."""
    if parallel_state.model_parallel_is_initialized():
        assert dist.get_world_size() == 1, "one process computes a model by itself"
        yield
        return
    assert not dist.is_initialized()
    with torch.random.fork_rng():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        try:
            distributed.start(Config())
            yield
        finally:
            distributed.stop()
