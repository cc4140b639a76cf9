"""Whole runs of students with fewer layers than their teacher: what they start as, what is exported, what goes on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_teachers import write_qwen2, write_qwen3
from megatron_lrc.checkpoints.run_directory import newest_checkpoint, read_state
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.train.start_checks import check
from runs import (
    assert_close_weights,
    assert_same_parameters,
    continued,
    make_config,
    on_layout,
    records,
    saved_in,
    train,
    without_times,
)
from tools_path import convert_to_hf

pytestmark = pytest.mark.distributed

WIDTH, VOCAB = 48, 301  # the tiny teachers'
KEPT = [0, 2, 3]


def with_layers(config: Config, *layers: str, count: int | None = None) -> Config:
    return replace(config, model=replace(config.model, student_layers=list(layers), student_num_layers=count))


@pytest.mark.parametrize("write", [pytest.param(write_qwen2, marks=pytest.mark.slow), write_qwen3])
def test_at_full_width_it_is_the_teacher_without_the_other_layers(tiny_text, tmp_path, write):
    """On two stages, in training and in transformers; what lives in head space comes from the layers that are kept."""
    teacher = tmp_path / "teacher"
    write(teacher, num_layers=4)
    config = make_config(str(teacher), tiny_text, tmp_path / "run", steps=0)
    config.model.student_hidden_size, config.logging.log_effective_rank = WIDTH, True
    config.projection.init, config.projection.calibration_tokens = "pca", 512
    train(on_layout(with_layers(config, "0", "2-3"), pp=2), 2)
    tokens = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))
    expected = logits_without(teacher, [1], tokens)
    assert convert_to_hf(["--load", str(tmp_path / "run"), "--output", str(tmp_path / "student")]) == 0
    assert (logits_without(tmp_path / "student", [], tokens) - expected).abs().max() < 1e-3
    assert (logits_without(teacher, [2], tokens) - expected).abs().max() > 0.05, "layers that are alike prove nothing"
    assert "| layers | 3, of the teacher's 0 2-3 (counted from 0) |" in (tmp_path / "student/README.md").read_text()
    (validation,) = records(tmp_path / "run", "validation.jsonl")
    assert {name: len(ranks) for name, ranks in validation["effective_rank"].items()} == {"teacher": 5, "student": 4}


def logits_without(directory: Path, dropped: list[int], tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in dropped]
    model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList(kept), len(kept)
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def test_it_trains_goes_on_and_is_refused_with_other_layers(tiny_llama, tiny_text, tmp_path):
    """A run that was counted in layers goes on with their list, and on two stages."""
    base = make_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "run", steps=2)
    train(with_layers(base, count=3))
    state, config, shape = read_state(newest_checkpoint(tmp_path / "run"))
    assert state.step == 2 and shape.num_layers == 3 and list(shape.teacher_layers) == KEPT
    assert config.model.student_layers == ["0", "2-3"]
    goes_on = continued(base, steps=3)
    for layers in ((), ("0", "1", "3")):
        with pytest.raises(
            ConfigError, match=r"3 layers \(the teacher's 0 2-3\), 2 KV groups, .*; the flags ask for 24"
        ):
            check(with_layers(goes_on, *layers).resolved(1), 1)
    train(on_layout(with_layers(goes_on, "0", "2-3"), pp=2), 2)
    first, *_, last = records(tmp_path / "run")
    assert last["step"] == 3 and {len(losses) for losses in last["clone_by_layer"].values()} == {3}
    assert last["clone_loss"] < first["clone_loss"]


def by_tinybert(config: Config) -> None:
    config.model.method = "tinybert"


def opened(config: Config) -> None:
    config.projection.open_after, config.projection.open_matrices = 1, "all"


def by_itself(config: Config) -> None:
    config.model.method, config.model.student_layers, config.model.student_num_layers = "ordinary", [], 2
    config.loss, config.projection.init_method_std = type(config.loss)(), 0.02


@pytest.mark.parametrize(
    "change",
    [
        opened,
        pytest.param(by_tinybert, marks=pytest.mark.slow),
        pytest.param(by_itself, marks=pytest.mark.slow),
    ],
)
def test_other_methods_train_fewer_layers_alike_on_two_stages(tiny_llama, tiny_text, tmp_path, change):
    config = with_layers(make_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "one", steps=2), "0", "2-3")
    config.optimizer.adam_eps = 1e-5  # gradients of rounding alone move nothing
    change(config)
    train(config)
    train(on_layout(saved_in(config, tmp_path / "two"), pp=2), 2)
    assert_close_weights(tmp_path / "one", tmp_path / "two", within=1e-4)
    assert convert_to_hf(["--load", str(tmp_path / "two"), "--output", str(tmp_path / "student")]) == 0  # verifies it
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert len(exported.model.layers) == (2 if change is by_itself else 3)


def test_naming_all_layers_changes_no_bit(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(num_layers=2), tiny_text, tmp_path / "plain", steps=2)
    train(config)
    train(with_layers(saved_in(config, tmp_path / "named"), "0-1", count=2))
    assert_same_parameters(tmp_path / "plain", tmp_path / "named")
    assert without_times(records(tmp_path / "plain")) == without_times(records(tmp_path / "named"))


def test_a_stage_without_its_layers_is_refused_before_anything_is_built(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "run", steps=2)
    with pytest.raises(ConfigError, match="Pipeline stage 1 would hold layers 2-3 of the teacher"):
        check(on_layout(with_layers(config, "0", "1"), pp=2).resolved(2), 2)
