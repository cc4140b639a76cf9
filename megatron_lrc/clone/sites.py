"""THE TABLE of cloned weights: one row per matrix of a layer, and one each for the embedding and the LM head.

A row says which width of the teacher's matrix its projection shrinks, where the matrix sits in a megatron-core
GPTModel, how tensor parallelism splits it, and which rows of a fused matrix are its own. Composing, pulling back,
capturing activations, reading a teacher and exporting a student are loops over these rows; nothing else knows a fused
layout.

Notation: D teacher hidden, d student hidden, o output features, i input features; `/tp` split over TP ranks.
Weights are stored (out, in). Source: arXiv 2505.12781, equations 1-3.

Fused layouts (megatron-core's): linear_qkv holds, for each KV group, its queries, then its key, then its value;
linear_fc1 holds on each rank its share of gate, then its share of up.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_lrc.clone.products import product_with_gradient
from megatron_lrc.config import ModelShape


@dataclass(frozen=True, slots=True)
class Site:
    """One cloned weight.

    projected: the width of W_T that shrinks from D to d. "input": W_S = W_T @ P; "output": W_S = P^T @ W_T.
    linear: the module that holds the matrix, as a path inside a TransformerLayer (or inside GPTModel for the two ends).
    split: dimension that tensor parallelism splits: 0 (rows, a column parallel layer) or 1 (columns, row parallel).
    """

    name: str
    projected: Literal["input", "output"]
    linear: str
    split: Literal[0, 1]


_QKV, _PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
_FC1, _FC2 = "mlp.linear_fc1", "mlp.linear_fc2"

LAYER_SITES: tuple[Site, ...] = (
    Site("q", "input", _QKV, 0),
    Site("k", "input", _QKV, 0),
    Site("v", "input", _QKV, 0),
    Site("o", "output", _PROJ, 1),
    Site("gate", "input", _FC1, 0),
    Site("up", "input", _FC1, 0),
    Site("down", "output", _FC2, 1),
)
EMBED = Site("embed", "input", "embedding.word_embeddings", 0)
LM_HEAD = Site("lm_head", "input", "output_layer", 0)

#: Linear modules of a layer whose outputs the clone loss compares.
CAPTURED_LINEARS: tuple[str, ...] = (_QKV, _PROJ, _FC1, _FC2)

#: Norms that a layer may have (`ModelShape.norms`), in the order they act: of what attention and the MLP read, and of
#: what they give, before it is added to the residual stream. `post` is the one before the MLP.
LAYER_NORMS: tuple[str, ...] = ("input", "after_attention", "post", "after_mlp")

#: A norm of what a block gives -> the site that gives it.
WRITER_BEFORE: dict[str, str] = {"after_attention": "o", "after_mlp": "down"}


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """What is needed to find q, k and v in a fused linear_qkv. Sizes in features."""

    head_dim: int
    queries_per_group: int

    @classmethod
    def of(cls, shape: ModelShape) -> "HeadLayout":
        return cls(shape.head_dim, shape.num_attention_heads // shape.num_query_groups)

    def rows_of(self, name: str) -> tuple[int, int]:
        """(start, length) of `name` within one KV group's rows."""
        queries = self.queries_per_group * self.head_dim
        return {"q": (0, queries), "k": (queries, self.head_dim), "v": (queries + self.head_dim, self.head_dim)}[name]


def select(site: Site, fused: Tensor, heads: HeadLayout, dim: int = 0) -> Tensor:
    """The part of a fused weight (dim 0) or activation (dim -1) that belongs to `site`, as a view.

    q, k, v: `dim` becomes two dimensions (KV groups of this rank, features of the group); gate, up: half of `dim`;
    other sites: the tensor itself. Flattening the result over those dimensions gives Hugging Face's row order.
    """
    if site.linear == _QKV:
        start, length = heads.rows_of(site.name)
        per_group = (heads.queries_per_group + 2) * heads.head_dim
        dim = dim % fused.dim()
        return fused.unflatten(dim, (-1, per_group)).narrow(dim + 1, start, length)
    if site.linear == _FC1:
        half = fused.shape[dim] // 2
        return fused.narrow(dim, 0 if site.name == "gate" else half, half)
    return fused


def kept_part(site: Site, teacher: Tensor, student: Tensor) -> Tensor:
    """What a student's matrix is made of, as a view: as many of the teacher's rows, or of o and down columns, as it
    has, which come first (`kept_rows`). Both as `select` gives them; in most students that is all of the teacher's."""
    return teacher.narrow(site.split, 0, student.shape[site.split])


def kept_features(linear: str, output: Tensor, width: int) -> Tensor:
    """The same of what a column parallel linear of the teacher gives, [..., f/tp]: [..., width]. Itself where that is
    all of it, else a copy, so that the rest can go."""
    if output.shape[-1] == width:
        return output
    beside = 2 if linear == _FC1 else 1  # gate and up
    return output.unflatten(-1, (beside, -1)).narrow(-1, 0, width // beside).reshape(*output.shape[:-1], width)


def compose(site: Site, teacher: Tensor, projection: Tensor) -> Tensor:
    """W_S from W_T: [..., o, D] @ [D, d], or [D, d]^T @ [D, i]. Shards of the other dimension give shards of W_S."""
    left, right = _factors(site, teacher, projection)
    return left @ right


def compose_into(student: Tensor, site: Site, teacher: Tensor, projection: Tensor) -> None:
    """The same, written to where W_S is: by the product itself, but for the parts of a fused q, k, v."""
    left, right = _factors(site, teacher, projection)
    if student.dim() == 2:
        torch.mm(left, right, out=student)
    else:
        student.copy_(left @ right)


def _factors(site: Site, teacher: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    return (teacher, projection) if site.projected == "input" else (projection.t(), teacher)


def pull_back(site: Site, teacher: Tensor, student_grad: Tensor) -> Tensor:
    """dP [D, d] from dW_S, the transpose of `compose`, in its dtype. Given shards, a partial sum over TP ranks."""
    if site.projected == "input":
        return product_with_gradient(teacher.flatten(0, -2).t(), student_grad.flatten(0, -2))
    return product_with_gradient(teacher, student_grad.t())


def projection_names(layers: Iterable[int], has_embedding: bool, has_lm_head: bool) -> list[str]:
    """Global names of the projections of these layers (0-based) and ends: `layers.{i}.{site}`, `embed`, `lm_head`."""
    names = [EMBED.name] if has_embedding else []
    names += [f"layers.{layer}.{site.name}" for layer in layers for site in LAYER_SITES]
    return names + ([LM_HEAD.name] if has_lm_head else [])
