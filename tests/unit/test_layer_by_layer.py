"""Transformers and megatron-core, each a layer at a time, compute the same model of every family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_teachers import OTHERWISE, ROTATED, WRITERS, write_llama
from megatron_lrc.hf.comparison import compare_logits
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.forward import HuggingFaceModel, fixed_tokens
from megatron_lrc.hf.rope import rotations
from megatron_lrc.hf.teacher import TeacherReader
from megatron_lrc.verify.weight_streams import stream_logits, stream_weights

TOKENS = fixed_tokens(301)

families = pytest.mark.parametrize("write", WRITERS)
either_head = pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])


@families
@either_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layer_by_layer_transformers_gives_the_logits_of_its_whole_model(
    tmp_path: Path, write: Callable, is_tied: bool, dtype: torch.dtype
) -> None:
    write(tmp_path, is_tied=is_tied, dtype=dtype, num_layers=3)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(TOKENS).logits
    found = HuggingFaceModel(tmp_path).logits(TOKENS)
    assert (found - expected).abs().max() < 1e-6
    assert expected.std() > 0.1


def test_layer_by_layer_transformers_reads_sharded_files_and_lets_go_of_every_layer(tmp_path: Path) -> None:
    write_llama(tmp_path / "one")
    write_llama(tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    sharded = HuggingFaceModel(tmp_path / "many")
    layers = sharded._model.model.layers
    assert torch.equal(sharded.logits(TOKENS), HuggingFaceModel(tmp_path / "one").logits(TOKENS))
    assert [weight.numel() for weight in layers.parameters()] == [0] * 18


@pytest.mark.parametrize("write", (*WRITERS, *OTHERWISE, *ROTATED))
@either_head
def test_both_engines_agree_about_every_family(tmp_path: Path, write: Callable, is_tied: bool) -> None:
    """In fp32 to rounding; in fp64 to 1e-9, so that the difference in fp32 is rounding and nothing else."""
    write(tmp_path, is_tied=is_tied)
    teacher = describe_teacher(tmp_path)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        weights = stream_weights(teacher.family, teacher.shape, TeacherReader(teacher).weight)
        ours = stream_logits(weights, teacher.shape, rotations(teacher, TOKENS.shape[1]), TOKENS, dtype)
        difference = compare_logits(ours, HuggingFaceModel(tmp_path).logits(TOKENS, dtype))
        assert difference.is_within(tolerance) and difference.top1_agreement == 1.0, (dtype, difference)


def test_the_fixed_tokens_are_spread_over_the_whole_vocabulary() -> None:
    for vocab_size in (301, 32000, 151936):
        tokens = fixed_tokens(vocab_size).flatten().sort().values
        assert tokens.unique().numel() == 128 and tokens[0] >= 0 and tokens[-1] < vocab_size
        assert max(tokens[0], tokens.diff().max(), vocab_size - tokens[-1]) < 3 * vocab_size / 128


def test_logits_that_are_not_finite_are_never_within_a_tolerance() -> None:
    logits = torch.randn(2, 3, 5)
    assert compare_logits(logits, logits.clone()).is_within(0.0)
    broken = logits.clone()
    broken[1, 2, 3] = torch.nan
    assert not compare_logits(logits, broken).is_within(1e30)
    assert not compare_logits(broken, broken).is_within(1e30)
