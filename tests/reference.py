"""The method in one process: transformers modules, fp64, plain autograd from the projections to the loss. The oracle.

Equations 1-3 and Algorithm 1 of arXiv 2505.12781, as directly as possible, sharing no code with the package: the
student's weights are composed inside the graph, both models run, all logits exist, and torch.autograd does the rest.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
#: Module that stands for several, and what is in it in its order.
FUSED = {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": ("gate", "up")}
PROJECTS_OUTPUT = ("o", "down")
FROZEN = ("proj.bias", "q_norm.weight", "k_norm.weight")
#: Names that transformers gives to a layer's norms -> ours, for each set of norms that a layer may have.
NORMS_BEFORE = {"input_layernorm": "input", "post_attention_layernorm": "post"}
NORMS_AFTER = {"post_attention_layernorm": "after_attention", "post_feedforward_layernorm": "after_mlp"}
NORMS_AROUND = {"input_layernorm": "input", "pre_feedforward_layernorm": "post", **NORMS_AFTER}
NORM_SETS = {frozenset(names): names for names in (NORMS_BEFORE, NORMS_AFTER, NORMS_AROUND)}


@dataclass
class Losses:
    """Means over unmasked tokens; clone by (layer, site)."""

    lm: Tensor
    kl: Tensor
    clone: dict[tuple[int, str], Tensor]

    def total(self, alpha: float, kl_weight: float, lm_weight: float = 1.0) -> Tensor:
        return lm_weight * self.lm + kl_weight * self.kl + alpha * sum(self.clone.values())


class ShiftedNorm(torch.nn.Module):
    """Gemma's: its weight is what is beyond 1."""

    def __init__(self, norm: torch.nn.Module):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * (1 + self.weight)


def in_fp64(model: PreTrainedModel) -> PreTrainedModel:
    """The model in fp64 throughout. transformers' RMSNorm goes to fp32 whatever the dtype; torch's does not. Where it
    caps attention's scores its softmax does so too."""
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and type(module) is not torch.nn.RMSNorm:
            if is_shifted(model):
                exact = ShiftedNorm(module)
            else:
                exact = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
                exact.weight = module.weight
            model.set_submodule(path, exact)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.config._attn_implementation = "capped"
    model = model.double().eval()
    embedding = model.get_input_embeddings()
    if hasattr(embedding, "embed_scale"):  # the root of the hidden size, as another dtype has rounded it
        embedding.embed_scale = torch.tensor(model.config.hidden_size**0.5, dtype=torch.float64)
    return model


def is_shifted(model: PreTrainedModel) -> bool:
    return type(model).__name__.startswith("Gemma")


def capped_attention(module, query, key, value, attention_mask, *, scaling, softcap, **others) -> tuple[Tensor, None]:
    """query, key, value [batch, heads, sequence, features]; the mask is True where a query meets a key."""
    if attention_mask is None:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = softcap * torch.tanh(query @ key.mT * scaling / softcap)
    scores = torch.where(attention_mask, scores, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("capped", capped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("capped", sdpa_mask)


def norm_names(model: PreTrainedModel) -> dict[str, str]:
    """transformers' name of each of a layer's norms -> ours."""
    found = frozenset(name for name, _ in model.model.layers[0].named_children() if name.endswith("layernorm"))
    return NORM_SETS[found]


def places(model: PreTrainedModel) -> dict[str, tuple[str, slice]]:
    """Site -> the module that holds it in a layer, and which of its output features are its own."""
    config, layer = model.config, model.model.layers[0]
    found = {site: (path, slice(None)) for site, path in MODULES.items()}
    keys = config.num_key_value_heads * layer.self_attn.head_dim
    sizes = {"q": config.num_attention_heads * layer.self_attn.head_dim, "k": keys, "v": keys}
    modules = dict(layer.named_modules())
    for path, sites in FUSED.items():
        first = 0
        for site in sites if path in modules else ():
            size = sizes.get(site, config.intermediate_size)
            found[site], first = (path, slice(first, first + size)), first + size
    return found


def document_numbers(tokens: Tensor, eod: int) -> Tensor:
    """[batch, sequence]: how many documents have ended before each token."""
    is_end = (tokens == eod).long()
    return is_end.cumsum(1) - is_end


def positions_in_documents(tokens: Tensor, eod: int) -> Tensor:
    """[batch, sequence]: how many tokens of its own document stand before each token."""
    numbers = document_numbers(tokens, eod)
    return (numbers[:, :, None] == numbers[:, None, :]).long().tril(-1).sum(-1)


def causal_mask(tokens: Tensor, documents: Tensor | None) -> Tensor:
    """[batch, 1, sequence, sequence], True where a token (third) attends to another (last). Never None: transformers
    would guess documents from the position ids."""
    size = tokens.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril().expand(len(tokens), 1, -1, -1)
    return causal if documents is None else causal & (documents[:, None, :, None] == documents[:, None, None, :])


def masks_of(config, causal: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask of each kind of layer that the model has. transformers puts no window on a mask that it is given."""
    window = getattr(config, "sliding_window", None)
    if window is None:
        return causal
    size = causal.shape[-1]
    near = causal & torch.ones(size, size, dtype=torch.bool).triu(1 - window)
    return {"full_attention": causal, "sliding_attention": near} if hasattr(config, "layer_types") else near


def divergence(log_teacher: Tensor, log_student: Tensor, kind: str, top_k: int | None = None) -> Tensor:
    """By token, of log-probabilities [..., vocabulary]. top_k: of the teacher's likeliest tokens one by one, and of all
    others together."""
    if top_k is not None:
        ids = log_teacher.topk(top_k).indices
        is_kept = torch.zeros_like(log_teacher, dtype=torch.bool).scatter(-1, ids, True)
        log_teacher, log_student = (
            torch.cat([x.gather(-1, ids), x.masked_fill(is_kept, -torch.inf).logsumexp(-1, keepdim=True)], dim=-1)
            for x in (log_teacher, log_student)
        )

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    if kind in ("forward", "reverse"):
        return kl(log_teacher, log_student) if kind == "forward" else kl(log_student, log_teacher)
    beta = float(kind.removeprefix("jsd:"))
    log_mixture = (beta * log_teacher.exp() + (1 - beta) * log_student.exp()).log()
    return beta * kl(log_teacher, log_mixture) + (1 - beta) * kl(log_student, log_mixture)


class Reference:
    """A teacher, and the student that projections and gains make of it. kept: the layers of the teacher that the
    student's are made of, in order; None: all of them. groups, neurons: how many of each layer's it has; None: all."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        student_size: int,
        student_epsilon: float | None = None,
        kept: tuple[int, ...] | None = None,
        groups: int | None = None,
        neurons: int | None = None,
    ):
        self.teacher = in_fp64(teacher).requires_grad_(False)
        config = copy.deepcopy(teacher.config)
        config.hidden_size = student_size
        config.head_dim = teacher.model.layers[0].self_attn.head_dim
        config.rms_norm_eps = config.rms_norm_eps if student_epsilon is None else student_epsilon
        self.kept = list(range(config.num_hidden_layers) if kept is None else kept)
        config.num_hidden_layers = self.num_layers = len(self.kept)
        self.per_group = config.num_attention_heads // config.num_key_value_heads
        config.num_key_value_heads = groups or config.num_key_value_heads
        config.num_attention_heads = config.num_key_value_heads * self.per_group
        config.intermediate_size = neurons or config.intermediate_size
        for by_layer in ("layer_types", "no_rope_layers"):
            if getattr(config, by_layer, None):
                setattr(config, by_layer, [getattr(teacher.config, by_layer)[layer] for layer in self.kept])
        self.student = in_fp64(type(teacher)(config))
        self.outputs: dict[str, Tensor] = {}
        #: Of a layer of the student, the teacher's rows of a matrix, or of o and down columns; all where not named.
        self.rows: dict[tuple[int, str], Tensor] = {}
        self.places, self.norm_names = places(self.teacher), norm_names(self.teacher)
        for prefix, model in (("T", self.teacher), ("S", self.student)):
            for layer in range(len(model.model.layers)):
                for site, (path, features) in places(model).items():
                    module = model.model.layers[layer].get_submodule(path)
                    module.register_forward_hook(self._keep(f"{prefix}.{layer}.{site}", features))

    def _keep(self, name, features):
        def hook(module, inputs, output):
            self.outputs[name], self.outputs[f"{name}.input"] = output[..., features], inputs[0]

        return hook

    def choose_rows(self, tokens: Tensor, documents: Tensor | None = None, positions: Tensor | None = None) -> None:
        """Keep the groups and neurons that add most to the residual stream over these tokens, each by itself. Without
        this a student has all of them."""
        masks = masks_of(self.teacher.config, causal_mask(tokens, documents))
        self.teacher(input_ids=tokens, position_ids=positions, attention_mask=masks)
        config, head_dim = self.student.config, self.student.config.head_dim
        for layer, of_teacher in enumerate(self.kept):
            block = self.teacher.model.layers[of_teacher]
            in_group = self.per_group * head_dim

            def energy(site: str, matrix: Tensor, start: int, width: int, of_teacher: int = of_teacher) -> float:
                own = self.outputs[f"T.{of_teacher}.{site}.input"][..., start : start + width]
                return (own.square().sum((0, 1)) * matrix[:, start : start + width].square().sum(0)).sum().item()

            o, down = block.self_attn.o_proj.weight, block.mlp.down_proj.weight
            if hasattr(block, "post_feedforward_layernorm"):  # channels count by what the norms behind multiply them by
                shift = is_shifted(self.teacher)
                o = o * (block.post_attention_layernorm.weight + shift).unsqueeze(1)
                down = down * (block.post_feedforward_layernorm.weight + shift).unsqueeze(1)
            groups = [energy("o", o, group * in_group, in_group) for group in range(o.shape[1] // in_group)]
            neurons = [energy("down", down, neuron, 1) for neuron in range(down.shape[1])]
            best = sorted(sorted(range(len(groups)), key=lambda g: -groups[g])[: config.num_key_value_heads])
            busy = sorted(sorted(range(len(neurons)), key=lambda n: -neurons[n])[: config.intermediate_size])
            queries = [row for group in best for row in range(group * in_group, (group + 1) * in_group)]
            keys = [row for group in best for row in range(group * head_dim, (group + 1) * head_dim)]
            kept = {"q": queries, "o": queries, "k": keys, "v": keys, "gate": busy, "up": busy, "down": busy}
            self.rows |= {(layer, site): torch.tensor(rows) for site, rows in kept.items()}

    def kept_part(self, layer: int, site: str, tensor: Tensor, dim: int) -> Tensor:
        rows = self.rows.get((layer, site))
        return tensor if rows is None else tensor.index_select(dim, rows)

    def student_weights(self, projections: dict[str, Tensor], norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """transformers name -> W_S, inside the graph. Without `lm_head`, `embed` serves both ends."""
        old = self.teacher.state_dict()
        head = projections.get("lm_head", projections["embed"])
        weights = {
            "model.embed_tokens.weight": old["model.embed_tokens.weight"] @ projections["embed"],
            "lm_head.weight": old["lm_head.weight"] @ head,
            "model.norm.weight": norms["final"],
        }
        for layer, of_teacher in enumerate(self.kept):
            prefix, old_prefix = f"model.layers.{layer}", f"model.layers.{of_teacher}"
            # Qwen's biases and q/k norms live in head space: the teacher's, unchanged.
            for name, value in old.items():
                if name.startswith(f"{old_prefix}.") and name.endswith(FROZEN):
                    if name.endswith("proj.bias") or len(value) != self.student.config.head_dim:
                        value = self.kept_part(layer, name.split(".")[-2][0], value, 0)
                    weights[name.replace(old_prefix, prefix)] = value
            for name, ours in self.norm_names.items():
                weights[f"{prefix}.{name}.weight"] = norms[f"layers.{layer}.{ours}"]
            for site, (path, features) in self.places.items():  # parts of one module in the order of its features
                teacher_weight = old[f"{old_prefix}.{path}.weight"][features]
                teacher_weight = self.kept_part(layer, site, teacher_weight, int(site in PROJECTS_OUTPUT))
                projection = projections[f"layers.{layer}.{site}"]
                projected = projection.t() @ teacher_weight if site in PROJECTS_OUTPUT else teacher_weight @ projection
                above = [weights[f"{prefix}.{path}.weight"]] if features.start else []
                weights[f"{prefix}.{path}.weight"] = torch.cat([*above, projected])
        return weights

    def losses(
        self,
        projections: dict[str, Tensor],
        norms: dict[str, Tensor],
        *,
        tokens: Tensor,
        labels: Tensor,
        mask: Tensor,
        temperature: float,
        kl_divergence: str = "forward",
        kl_top_k: int | None = None,
        attention_at_teacher_width: bool = False,
        detach_targets: bool = False,
        is_relative: bool = False,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Losses:
        """tokens, labels, mask: [batch, sequence]; labels are already shifted.

        attention_at_teacher_width: the released code's o term, the student's attention through the teacher's o matrix.
        is_relative: a token's clone loss is Huber's, of its distance relative to its target's in the teacher, or to
        the geometric mean of these over the tokens if that is larger.
        documents: [batch, sequence], the number of each token's document, the only one that it attends to.
        positions: [batch, sequence], of each token for RoPE.
        """
        weights = self.student_weights(projections, norms)
        mask_of_layers = masks_of(self.teacher.config, causal_mask(tokens, documents))
        inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask_of_layers}
        teacher_logits = self.teacher(**inputs).logits
        student_logits = torch.func.functional_call(self.student, weights, (), inputs, tie_weights=False).logits
        mask = mask.double()
        count = mask.sum()

        def mean(per_token: Tensor) -> Tensor:
            return (per_token * mask).sum() / count

        lm = mean(F.cross_entropy(student_logits.transpose(1, 2), labels, reduction="none"))
        log_student = F.log_softmax(student_logits / temperature, -1)
        log_teacher = F.log_softmax(teacher_logits / temperature, -1)
        kl = temperature**2 * mean(divergence(log_teacher, log_student, kl_divergence, kl_top_k))
        clone = {}
        for layer, of_teacher in enumerate(self.kept):
            for site in MODULES:
                target, student = self.outputs[f"T.{of_teacher}.{site}"], self.outputs[f"S.{layer}.{site}"]
                target = target if site in PROJECTS_OUTPUT else self.kept_part(layer, site, target, -1)
                energy = target.detach().square().mean(-1)
                typical = mean(energy.log()).exp()
                if site == "o" and attention_at_teacher_width:
                    matrix = self.teacher.model.layers[of_teacher].self_attn.o_proj.weight
                    matrix = self.kept_part(layer, site, matrix, 1)
                    student = self.outputs[f"S.{layer}.o.input"] @ matrix.t()
                elif site in PROJECTS_OUTPUT:
                    target = target @ projections[f"layers.{layer}.{site}"]
                    target = target.detach() if detach_targets else target
                error = (student - target).square().mean(-1)
                if is_relative:  # twice Huber's loss of the relative distance, with threshold 1
                    distance = (error / energy.maximum(typical)).sqrt()
                    error = 2 * F.huber_loss(distance, torch.zeros_like(distance), reduction="none")
                clone[layer, site] = mean(error)
        return Losses(lm, kl, clone)
