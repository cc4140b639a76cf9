"""The effective rank of hidden states against singular values of the same states, and the same on every layout."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_lrc.config import Config
from megatron_lrc.data.datasets import build_datasets
from megatron_lrc.mcore import distributed
from megatron_lrc.train import effective_rank
from ranks import run_ranks
from runs import make_config, on_layout, records, saved_in, train
from tools_path import convert_to_hf

LAYERS = 4


@pytest.fixture
def effective_rank_config(tiny_llama, tiny_text, tmp_path) -> Config:
    """A run of two steps, so that the student differs from layer to layer, validated before and after."""
    config = make_config(tiny_llama(num_layers=LAYERS), tiny_text, tmp_path / "run", steps=2)
    config.logging.log_effective_rank = True
    return config


def validation_tokens(config: Config) -> Tensor:
    """[sequences, tokens] that one validation sees. On a rank."""
    distributed.start(config)
    _, data = build_datasets(config)
    assert data is not None and config.training.global_batch_size is not None
    count = config.logging.eval_iters * config.training.global_batch_size
    return torch.stack([data[index]["tokens"] for index in range(count)])


def expected(model_directory: str | Path, tokens: Tensor) -> list[float]:
    """By transformers and torch.linalg.svdvals. The states are what the norms in front of the layers are given."""
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float64).eval()
    states: list[Tensor] = []
    norms = [layer.input_layernorm for layer in model.model.layers] + [model.model.norm]
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens)
    found = []
    for state in states:
        values = torch.linalg.svdvals(state / state.square().mean(-1, keepdim=True).sqrt())
        weights = values / values.sum()
        found.append((-(weights * weights.log()).sum()).exp().item())
    return found


@pytest.mark.distributed
def test_effective_ranks_are_those_of_the_singular_values(effective_rank_config, tmp_path):
    train(effective_rank_config)
    (tokens,) = run_ranks(1, validation_tokens, effective_rank_config)
    assert convert_to_hf(["--load", str(tmp_path / "run"), "--output", str(tmp_path / "hf"), "--no-verify"]) == 0
    before, after = (line["effective_rank"] for line in records(tmp_path / "run", "validation.jsonl"))
    assert len(after["teacher"]) == len(after["student"]) == LAYERS + 1
    assert after["teacher"] == pytest.approx(expected(effective_rank_config.model.teacher, tokens), rel=1e-4)
    assert after["student"] == pytest.approx(expected(tmp_path / "hf", tokens), rel=1e-4)
    assert before["teacher"] == after["teacher"] and before["student"] != after["student"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "ranks, layout",
    [(2, {"tp": 2}), (2, {"pp": 2}), (2, {"pp": 2, "chunks": 2}), (2, {"cp": 2}), (2, {})],
    ids=["TP2+SP", "PP2", "PP2-interleaved-x2", "CP2", "DP2"],
)
def test_effective_ranks_do_not_depend_on_the_layout(effective_rank_config, tmp_path, ranks, layout):
    effective_rank_config.training.train_iters = 0
    train(effective_rank_config)
    other = saved_in(effective_rank_config, tmp_path / "other")
    train(on_layout(other, **layout), ranks)
    (line,), (reference,) = (records(tmp_path / run, "validation.jsonl") for run in ("other", "run"))
    for model in ("teacher", "student"):
        assert line["effective_rank"][model] == pytest.approx(reference["effective_rank"][model], rel=1e-5)


def test_a_matrix_of_equal_singular_values_has_full_effective_rank():
    assert effective_rank.effective_rank(3.0 * torch.eye(7, dtype=torch.float64)).item() == pytest.approx(7)
    one_direction = torch.ones(7, 7, dtype=torch.float64)
    assert effective_rank.effective_rank(one_direction).item() == pytest.approx(1, abs=1e-6)


def test_states_that_are_not_finite_have_no_effective_rank_and_stop_nothing():
    assert effective_rank.effective_rank(torch.full((3, 3), torch.inf)).isnan()
