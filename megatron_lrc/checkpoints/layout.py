"""Where a model's tensors lie in a megatron-core distributed checkpoint of a GPTModel.

The keys are those of `GPTModel.sharded_state_dict()`: a layer's tensors are stacked over the layers ([layers, ...]),
norm gains go by Transformer Engine's names (megatron-core's local spec maps its own onto them), the fused matrices are
those of one tensor parallel rank: KV group after KV group in linear_qkv, all of gate and then all of up in linear_fc1.

A `Box` is the part of such a global tensor that one reads or writes at once. `sites.select` finds q, k and v in it.

Notation: L layers, D hidden, v vocabulary, q query and k key features, f FFN width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from megatron_lrc.clone.sites import EMBED, LAYER_SITES, LM_HEAD, Site
from megatron_lrc.config import ModelShape

#: Prefixes of a checkpoint's keys for what a clone trains: its projections (D, d), and its norm gains (d,).
PROJECTIONS, NORMS = "projections.", "norms."
#: Prefix of the keys for what the clone loss divides by, a site's each (7,).
ENERGIES = "clone_energies."

#: And of those for the teacher's KV groups and FFN neurons that a slimmer student keeps, int64.
KEPT = "kept."

_LAYERS = "decoder.layers."
#: Ends of the names of q and k norms' gains: over a head, and over all heads together.
QK_NORMS = ("_norm", "_wide_norm")
SITES: dict[str, Site] = {site.name: site for site in (EMBED, *LAYER_SITES, LM_HEAD)}
_QKV, _FC1 = SITES["q"].linear, SITES["gate"].linear

#: Our names -> keys of what is no site's weight.
_OTHER_KEYS: dict[str, str] = {
    "input": f"{_LAYERS}{_QKV}.layer_norm_weight",
    "after_attention": f"{_LAYERS}self_attn_bda.norm.weight",
    "post": f"{_LAYERS}{_FC1}.layer_norm_weight",
    "after_mlp": f"{_LAYERS}mlp_bda.norm.weight",
    "final": "decoder.final_layernorm.weight",
    **{f"{site}{kind}": f"{_LAYERS}self_attention.{site}_layernorm.weight" for site in "qk" for kind in QK_NORMS},
    **{f"{name}_bias": f"{_LAYERS}{_QKV}.bias" for name in "qkv"},
}


@dataclass(frozen=True, slots=True)
class Box:
    """Part of a global tensor. names: which of a layer's (or the model's) tensors are in it, in our spelling.

    part, parts: with tensor parallelism over `parts` ranks, the share of this one.
    """

    key: str
    names: tuple[str, ...]
    layer: int | None
    part: int
    parts: int
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Its sizes, without the dimension that stacks the layers."""
        return self.sizes if self.layer is None else self.sizes[1:]


def key_of(name: str) -> str:
    """The key of a tensor: a site, a norm of `ModelShape.norms`, "final", or a frozen one ("q_bias", "k_norm", ...)."""
    if name in _OTHER_KEYS:
        return _OTHER_KEYS[name]
    site = SITES[name]
    return f"{site.linear if site in (EMBED, LM_HEAD) else _LAYERS + site.linear}.weight"


def stored_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Key -> global shape of everything that a model of this shape stores. Vocabulary rows are unpadded."""
    layers, hidden, ffn = shape.num_layers, shape.hidden_size, shape.ffn_hidden_size
    queries, head_dim = shape.num_attention_heads * shape.head_dim, shape.head_dim
    qkv_rows = queries + 2 * shape.num_query_groups * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (shape.vocab_size, hidden),
        "q": (layers, qkv_rows, hidden),
        "o": (layers, hidden, queries),
        "gate": (layers, 2 * ffn, hidden),
        "down": (layers, hidden, ffn),
        "final": (hidden,),
        **{name: (layers, hidden) for name in shape.norms},
    }
    if shape.has_qkv_bias:
        shapes["q_bias"] = (layers, qkv_rows)
    if shape.has_qk_norm:
        shapes |= {"q_norm": (layers, head_dim), "k_norm": (layers, head_dim)}
    if shape.has_wide_qk_norm:
        shapes |= {"q_wide_norm": (layers, queries), "k_wide_norm": (layers, shape.num_query_groups * head_dim)}
    if not shape.is_tied:
        shapes["lm_head"] = (shape.vocab_size, hidden)
    return {key_of(name): size for name, size in shapes.items()}


def box_of(shape: ModelShape, name: str, layer: int | None = None, *, part: int = 0, parts: int = 1) -> Box:
    """The box that holds the `part`-th of `parts` tensor parallel shares of a tensor; norm gains do not split, but for
    those of wide norms.

    q, k and v (weights and biases) come in one box: each KV group's rows are together.
    """
    key = key_of(name)
    site = SITES.get(name.removesuffix("_bias"))
    global_shape = stored_shapes(shape)[key]
    names = (name,)
    offsets, sizes = [0] * len(global_shape), list(global_shape)
    if layer is not None:
        offsets[0], sizes[0] = layer, 1
    if name.endswith("_wide_norm"):
        sizes[1] //= parts
        offsets[1] = part * sizes[1]
    if site is not None:
        blocks = ["gate", "up"] if site.linear == _FC1 else [name]  # stored one after the other
        dim = site.split + (layer is not None)
        length, remainder = divmod(global_shape[dim], parts * len(blocks))
        assert remainder == 0, f"{name} {global_shape} does not split into {parts}"
        offsets[dim], sizes[dim] = (blocks.index(name) * parts + part) * length, length
        if site.linear == _QKV:
            names = tuple(name.replace(site.name, other, 1) for other in "qkv")
    return Box(key, names, layer, part, parts, global_shape, tuple(offsets), tuple(sizes))


def rows_box(shape: ModelShape, site: Site, start: int, length: int) -> Box:
    """Rows of the embedding or the LM head."""
    key = key_of(site.name)
    global_shape = stored_shapes(shape)[key]
    return Box(key, (site.name,), None, 0, 1, global_shape, (start, 0), (length, global_shape[1]))


def kept_name(layer: int, unit: str) -> str:
    """Of the student's layer. unit: "groups" or "neurons"."""
    return f"{KEPT}layers.{layer}.{unit}"


def whole_box(key: str, size: tuple[int, ...]) -> Box:
    """All of a tensor that no GPTModel has."""
    return Box(key, (key,), None, 0, 1, size, (0,) * len(size), size)


def all_boxes(shape: ModelShape) -> Iterator[Box]:
    """The boxes that a model is written in, in the order of the forward pass; they cover it once.

    Small enough that up to 8 tensor parallel ranks each read what is theirs and little else.
    """
    parts = gcd(shape.num_query_groups, shape.ffn_hidden_size, 8)
    vocabulary_parts = gcd(shape.vocab_size, 64)
    frozen = ["q_bias"] * shape.has_qkv_bias + ["q_norm", "k_norm"] * shape.has_qk_norm
    frozen += ["q_wide_norm", "k_wide_norm"] * shape.has_wide_qk_norm

    def split(name: str, layer: int | None, parts: int) -> Iterator[Box]:
        return (box_of(shape, name, layer, part=part, parts=parts) for part in range(parts))

    yield from split("embed", None, vocabulary_parts)
    for layer in range(shape.num_layers):
        for name in (*shape.norms, *frozen):
            yield box_of(shape, name, layer)
        for name in ("q", "o", "gate", "up", "down"):
            yield from split(name, layer, parts)
    yield box_of(shape, "final")
    if not shape.is_tied:
        yield from split("lm_head", None, vocabulary_parts)
