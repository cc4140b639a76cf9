"""Training checkpoints as the code that was released with the paper writes them, and the students that it makes of
them: its own formulas on transformers' modules, sharing nothing with the package."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Switches:
    """The released code's own: use_all_attn, use_in_out_mlp, tie_word_emb_proj, del_layers, use_additional_align."""

    all_attn: bool = True
    in_out_mlp: bool = False
    tie_word_emb_proj: bool = False
    del_layers: tuple[int, ...] = ()
    align: bool = False


def write_released(directory: Path, teacher: str, width: int, switches: Switches, epsilon: float = 1e-5) -> Path:
    """Random zoom matrices and gains."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    generator = torch.Generator().manual_seed(5)
    hidden = model.config.hidden_size

    def linear(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64) / columns**0.5

    def gain() -> Tensor:
        return 1 + torch.rand(width, generator=generator, dtype=torch.float64)

    tensors = {"model.zoom.weight": linear(width, hidden), "model.target_norm.weight": gain()}
    if not switches.tie_word_emb_proj:
        tensors["zoom_down.weight"] = linear(width, hidden)
    for layer in range(model.config.num_hidden_layers):
        if layer in switches.del_layers:
            continue
        attention, mlp = (f"model.layers.{layer}.{module}." for module in ("self_attn", "mlp"))
        for name in ("zoom_q", "zoom_k", "zoom_v") if switches.all_attn else ("zoom_up",):
            tensors[f"{attention}{name}.weight"] = linear(hidden, width)
        tensors[f"{attention}zoom_down.weight"] = linear(width, hidden)
        if switches.in_out_mlp:
            tensors[f"{mlp}zoom_up.weight"] = linear(hidden, width)
        else:
            tensors |= {f"{mlp}{name}.weight": linear(width, hidden) for name in ("zoom_up", "zoom_gate")}
        tensors[f"{mlp}zoom_down.weight"] = linear(width, hidden)
        if switches.align:
            tensors |= {f"{module}zoom_out.weight": linear(hidden, width) for module in (attention, mlp)}
        for name in ("target_input_layernorm", "target_post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = gain()
    directory.mkdir(parents=True)
    save_file({name: tensor.float() for name, tensor in tensors.items()}, directory / "model.safetensors")
    values = json.loads((Path(teacher) / "config.json").read_text())
    values |= {"architectures": ["CoTrainLM"], "target_hidden_size": width, "target_rms_norm_eps": epsilon}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def merged(teacher: str, tensors: dict[str, Tensor], switches: Switches) -> dict[str, Tensor]:
    """The student's weights by their names in transformers, fp64: what the released conversion computes."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    zoom = {name: tensor.double() for name, tensor in tensors.items()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = zoom["model.zoom.weight"] if switches.tie_word_emb_proj else zoom["zoom_down.weight"]
    weights["lm_head.weight"] = torch.nn.functional.linear(weights["lm_head.weight"], head)
    weights["model.embed_tokens.weight"] = torch.nn.functional.linear(
        model.get_input_embeddings().weight.detach(), zoom["model.zoom.weight"]
    )
    weights["model.norm.weight"] = zoom["model.target_norm.weight"]
    kept = [layer for layer in range(model.config.num_hidden_layers) if layer not in switches.del_layers]
    student = {name: tensor for name, tensor in weights.items() if ".layers." not in name}
    for place, layer in enumerate(kept):
        old, new = f"model.layers.{layer}.", f"model.layers.{place}."
        for name in weights:
            if name.startswith(old):
                student[new + name.removeprefix(old)] = weights[name]
        for site in "qkv":
            up = zoom[f"{old}self_attn.zoom_{site if switches.all_attn else 'up'}.weight"]
            student[f"{new}self_attn.{site}_proj.weight"] = weights[f"{old}self_attn.{site}_proj.weight"] @ up
        for module, site in (("self_attn", "o"), ("mlp", "down")):
            down = zoom[f"{old}{module}.zoom_down.weight"]
            student[f"{new}{module}.{site}_proj.weight"] = down @ weights[f"{old}{module}.{site}_proj.weight"]
        for site in ("gate", "up"):
            weight = weights[f"{old}mlp.{site}_proj.weight"]
            up = zoom[f"{old}mlp.zoom_{'up' if switches.in_out_mlp else site}.weight"]
            student[f"{new}mlp.{site}_proj.weight"] = weight @ up if switches.in_out_mlp else weight @ up.t()
        for name in ("input_layernorm", "post_attention_layernorm"):
            student[f"{new}{name}.weight"] = zoom[f"{old}target_{name}.weight"]
    return student
