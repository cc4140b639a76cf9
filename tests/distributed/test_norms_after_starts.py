"""Closed-form starts of students whose blocks' outputs are normed: what has a closed form, and what is measured."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_teachers import write_gemma2, write_olmo2
from megatron_lrc.checkpoints.saved_student import open_checkpoint
from megatron_lrc.config import Config
from megatron_lrc.data.datasets import build_datasets
from ranks import run_ranks
from reference import is_shifted
from runs import make_config, on_layout, records, train

WIDTH, STUDENT = 48, 24
BEHIND = {"after_attention": ("post_attention_layernorm", "o"), "after_mlp": ("post_feedforward_layernorm", "down")}


@pytest.fixture(params=[write_olmo2, write_gemma2])
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    request.param(tmp_path / "teacher", num_layers=4)
    return str(tmp_path / "teacher")


def start(teacher: str, text: str, run: Path, init: str, **layout: int) -> Config:
    config = make_config(teacher, text, run, steps=0)
    config.model.student_hidden_size = STUDENT
    config.projection.init = init
    if config.projection.is_calibrated:
        config.projection.calibration_tokens = 512
    train(on_layout(config, **layout), 2 if layout else 1)
    return config


def outputs_of_blocks(config: Config) -> dict[str, Tensor]:
    """By transformers, over the calibration tokens: norm behind a block -> [n, D] that it is given."""
    data, _ = build_datasets(config)
    count = config.projection.calibration_tokens // config.training.seq_length
    tokens = torch.stack([data[index]["tokens"] for index in range(count)])
    model = AutoModelForCausalLM.from_pretrained(config.model.teacher).eval()
    found: dict[str, Tensor] = {}

    def note(name: str, module: torch.nn.Module, args: tuple) -> None:
        found[name] = args[0].flatten(0, 1).double()

    for index, layer in enumerate(model.model.layers):
        for norm, (path, _) in BEHIND.items():
            layer.get_submodule(path).register_forward_pre_hook(partial(note, f"layers.{index}.{norm}"))
    with torch.no_grad():
        model(tokens)
    return found


def rms(x: Tensor, epsilon: float = 0.0) -> Tensor:
    return (x.square().mean(-1) + epsilon).sqrt()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("init", "layout"),
    [
        ("ridge", {"tp": 2}),
        ("channel", {}),
        pytest.param("pca", {"pp": 2}, marks=pytest.mark.slow),
        pytest.param("orthogonal", {}, marks=pytest.mark.slow),
    ],
)
def test_what_a_block_gives_is_the_teachers_in_the_basis(teacher, tiny_text, tmp_path, init, layout):
    """P = diag(g) Q / rms(g), or Q of channels, and a gain that is right in the mean over the calibration's tokens."""
    config = start(teacher, tiny_text, tmp_path / "run", init, **layout)
    (outputs,) = run_ranks(1, outputs_of_blocks, config.resolved(1)) if init != "orthogonal" else ({},)
    model, saved = AutoModelForCausalLM.from_pretrained(teacher), open_checkpoint(str(tmp_path / "run"))
    shift = float(is_shifted(model))
    epsilon = model.config.rms_norm_eps
    scale = (WIDTH / STUDENT) ** 0.5 if shift else 1.0  # Gemma's embeddings are multiplied by the root of the width
    basis = saved.projections["embed"].double() / scale
    assert torch.allclose(basis.t() @ basis, torch.eye(STUDENT).double(), atol=1e-5)
    for index, layer in enumerate(model.model.layers):
        for norm, (path, site) in BEHIND.items():
            gain = layer.get_submodule(path).weight.detach().double() + shift
            found = saved.projections[f"layers.{index}.{site}"].double()
            expected = basis if init == "channel" else gain[:, None] * basis / rms(gain)
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), (index, site)
            factor = basis.t() @ gain if init == "channel" else rms(gain)
            if outputs:
                given = outputs[f"layers.{index}.{norm}"]
                factor = factor * (rms(given @ expected, epsilon) / rms(given, epsilon)).mean()
            got = saved.norms[f"layers.{index}.{norm}"].double() + shift
            assert (got - factor).abs().max() < 1e-5 * factor.abs().max(), (index, norm)


@pytest.mark.distributed
def test_at_full_width_channels_are_the_teacher_and_other_bases_near_it(teacher, tiny_text, tmp_path):
    """Random gains of 0.2's spread are far from one number, and so from what a rotation can follow."""
    kl = {}
    for init in ("channel", "pca", "random"):
        config = make_config(teacher, tiny_text, tmp_path / init, steps=0)
        config.model.student_hidden_size, config.projection.init = WIDTH, init
        if config.projection.is_calibrated:
            config.projection.calibration_tokens = 512
        train(config)
        (validation,) = records(tmp_path / init, "validation.jsonl")
        kl[init] = validation["teacher_kl"]
    assert kl["channel"] < 1e-5 < kl["pca"] < 0.3 * kl["random"]
