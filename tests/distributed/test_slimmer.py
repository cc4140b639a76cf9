"""Whole runs of students that keep part of their teacher's KV groups and FFN neurons."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from convert_tool import convert
from hf_teachers import write_qwen2
from megatron_lrc.checkpoints.saved_student import open_checkpoint
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.hf.kept_file import KEPT_FILE, read_kept
from megatron_lrc.train.start_checks import check
from runs import (
    assert_close_weights,
    assert_same_parameters,
    continued,
    make_config,
    on_layout,
    records,
    saved_in,
    saving,
    train,
    without_times,
)
from tools_path import convert_to_hf

pytestmark = pytest.mark.distributed

WIDTH, VOCAB, HEAD_DIM, QUERIES = 48, 301, 16, 2  # the tiny teachers'; queries of a group
GROUPS, NEURONS = 2, 24  # of 4 and 80


def slimmer(config: Config, groups: int | None = GROUPS, neurons: int | None = NEURONS) -> Config:
    model = replace(config.model, student_num_query_groups=groups, student_ffn_hidden_size=neurons)
    return replace(config, model=model, projection=replace(config.projection, calibration_tokens=512))


@pytest.fixture
def config(tiny_llama, tiny_text, tmp_path) -> Config:
    """Of a clone with all rows, in two steps."""
    config = make_config(tiny_llama(num_heads=8, num_kv_heads=4), tiny_text, tmp_path / "run", steps=2)
    config.optimizer.adam_eps = 1e-5  # gradients of rounding alone move nothing
    return config


def test_at_full_width_it_is_the_teacher_without_the_rest(tiny_text, tmp_path):
    """On two tensor parallel ranks, of a converted teacher, then in transformers; biases go with their rows, and one
    layer is left out."""
    teacher = tmp_path / "teacher"
    write_qwen2(teacher, num_layers=3, num_heads=8, num_kv_heads=4)
    convert(teacher, tmp_path / "converted")
    config = slimmer(make_config(str(tmp_path / "converted"), tiny_text, tmp_path / "run", steps=0))
    config.model.student_hidden_size, config.model.student_layers = WIDTH, ["0", "2"]
    config.projection.init = "pca"
    train(on_layout(config, tp=2), 2)
    assert convert_to_hf(["--load", str(tmp_path / "run"), "--output", str(tmp_path / "student")]) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (GROUPS * QUERIES, GROUPS)
    kept = read_kept(tmp_path / "student")
    assert kept.layers == (0, 2) and list(kept.rows) == [0, 1]
    without = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    without.model.layers = torch.nn.ModuleList([without.model.layers[0], without.model.layers[2]])
    without.config.num_hidden_layers = 2
    in_group = QUERIES * HEAD_DIM
    for layer, rows in kept.rows.items():
        assert len(rows.groups) == GROUPS and len(rows.neurons) == NEURONS
        module = without.model.layers[layer]
        zero_other_columns(
            module.self_attn.o_proj, (rows.groups[:, None] * in_group + torch.arange(in_group)).flatten()
        )
        zero_other_columns(module.mlp.down_proj, rows.neurons)
    tokens = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = without(tokens, use_cache=False).logits
        assert (student(tokens).logits - expected).abs().max() < 1e-3
    card = (tmp_path / "student/README.md").read_text()
    assert "| heads | 4 query, 2 key-value, 16 features each (of 4) |" in card and "| FFN width | 24 (of 80) |" in card


def zero_other_columns(linear: torch.nn.Linear, kept: torch.Tensor) -> None:
    columns = linear.weight.data[:, kept].clone()
    linear.weight.data.zero_()
    linear.weight.data[:, kept] = columns


def test_it_goes_on_on_other_ranks_with_the_rows_that_it_has(config, tmp_path):
    """As without the interruption; with data that would choose others; and as the start of another run."""
    train(saved_in(slimmer(config), tmp_path / "whole"))
    train(replace(on_layout(slimmer(config), tp=2), training=replace(config.training, train_iters=1)), 2)
    on_one = continued(slimmer(config), steps=2)
    on_one.projection.calibration_tokens = 16
    for groups, neurons in ((None, NEURONS), (GROUPS, 26)):
        with pytest.raises(ConfigError, match="2 KV groups, 24 FFN neurons.*; the flags ask for 24"):
            check(slimmer(on_one, groups, neurons).resolved(1), 1)
    train(on_one)
    whole, parts = (open_checkpoint(str(tmp_path / name)) for name in ("whole", "run"))
    for name, matrix in whole.projections.items():
        torch.testing.assert_close(parts.projections[name], matrix, rtol=0, atol=1e-5)
    again = saving(saved_in(on_one, tmp_path / "again"), load=None, pretrained_checkpoint=str(tmp_path / "run"))
    train(again)
    for other in (parts, open_checkpoint(str(tmp_path / "again"))):
        for layer, rows in whole.kept.items():
            assert torch.equal(rows.groups, other.kept[layer].groups)
            assert torch.equal(rows.neurons, other.kept[layer].neurons)


@pytest.mark.slow
def test_opened_it_is_the_same_on_two_ranks(config, tmp_path):
    config.projection.open_after, config.projection.open_matrices = 1, "all"
    train(slimmer(config))
    train(on_layout(saved_in(slimmer(config), tmp_path / "two"), tp=2), 2)
    assert_close_weights(tmp_path / "run", tmp_path / "two", within=1e-4)
    assert convert_to_hf(["--load", str(tmp_path / "two"), "--output", str(tmp_path / "student")]) == 0  # verifies it


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ordinary", "logits", "tinybert"])
def test_other_methods_train_its_shape(config, tmp_path, method):
    config = slimmer(config, None if method == "tinybert" else GROUPS)
    config.model.method, config.projection = method, type(config.projection)()
    config.loss = type(config.loss)()
    train(on_layout(config, tp=2), 2)
    assert convert_to_hf(["--load", str(tmp_path / "run"), "--output", str(tmp_path / "student")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.intermediate_size == NEURONS
    assert not (tmp_path / "student" / KEPT_FILE).exists()


def test_naming_all_rows_changes_no_bit(config, tmp_path):
    train(config)
    train(slimmer(saved_in(config, tmp_path / "named"), 4, 80))
    assert_same_parameters(tmp_path / "run", tmp_path / "named")
    assert without_times(records(tmp_path / "run")) == without_times(records(tmp_path / "named"))


@pytest.mark.parametrize(
    ("groups", "neurons", "tp", "said"),
    [
        (5, None, 1, "--student-num-query-groups 5 is above the teacher's 4 KV groups"),
        (None, 81, 1, "--student-ffn-hidden-size 81 is above the teacher's 80 FFN neurons"),
        (3, None, 2, "--student-num-query-groups 3 is not divisible by --tensor-model-parallel-size 2"),
        (None, 25, 2, "--student-ffn-hidden-size 25 is not divisible by --tensor-model-parallel-size 2"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_built(config, groups, neurons, tp, said):
    with pytest.raises(ConfigError, match=said):
        check(on_layout(slimmer(config, groups, neurons), tp=tp).resolved(tp), tp)


def test_a_file_that_is_damaged_is_a_sentence(tmp_path: Path):
    (tmp_path / KEPT_FILE).write_bytes(b"\x10")
    with pytest.raises(ConfigError, match=r"kept.safetensors is damaged .* Export the student again"):
        read_kept(tmp_path)
