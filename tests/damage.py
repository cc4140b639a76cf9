"""Ways in which a Hugging Face directory that an export wrote may be wrong: each changes it in place."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory: Path, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


def swap_rows_of_q(directory: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors["model.layers.1.self_attn.q_proj.weight"]
        weight[[0, 1]] = weight[[1, 0]]

    change_weights(directory, swap)


def swap_gate_and_up(directory: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    change_weights(directory, swap)


def zero_a_bias(directory: Path) -> None:
    change_weights(directory, lambda tensors: tensors["model.layers.1.self_attn.k_proj.bias"][:3].zero_())


def give_o_a_bias(directory: Path) -> None:
    change_weights(directory, lambda tensors: tensors["model.layers.1.self_attn.o_proj.bias"][:1].fill_(0.01))


def reset_a_norm_of_q(directory: Path) -> None:
    change_weights(directory, lambda tensors: tensors["model.layers.0.self_attn.q_norm.weight"].fill_(1.0))


def forget_rope_scaling(directory: Path) -> None:
    change_config(directory, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rope_scaling=None)


def change_rope_theta(directory: Path) -> None:
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    change_config(directory, rope_parameters=rope | {"rope_theta": 500000.0}, rope_theta=500000.0)


def halve_the_heads(directory: Path) -> None:
    """And double their size: every tensor keeps its shape."""
    change_config(directory, head_dim=32, num_attention_heads=2, num_key_value_heads=1)


def change_head_dim(directory: Path) -> None:
    change_config(directory, head_dim=8)


def change_the_epsilon(directory: Path) -> None:
    change_config(directory, rms_norm_eps=1e-3)


def say_tied(directory: Path) -> None:
    """As a writer would that takes the student for a tied one: the LM head is not in the file either."""
    change_config(directory, tie_word_embeddings=True)
    change_weights(directory, lambda tensors: tensors.pop("lm_head.weight"))


def say_tied_beside_an_lm_head(directory: Path) -> None:
    """transformers warns and does not tie; others do."""
    change_config(directory, tie_word_embeddings=True)


def say_untied(directory: Path) -> None:
    change_config(directory, tie_word_embeddings=False)


def lose_a_tensor(directory: Path) -> None:
    change_weights(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
