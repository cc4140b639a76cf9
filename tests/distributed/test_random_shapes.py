"""Losses and every gradient equal the fp64 reference whatever the sizes of teacher, student and batch."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gradient_cases import Layout, Sizes, compare_with_the_reference, global_batch
from hf_teachers import LLAMA3_ROPE, _write

FAMILIES = {
    "Llama": (LlamaForCausalLM, LlamaConfig),
    "Qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "Qwen3": (Qwen3ForCausalLM, Qwen3Config),
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Case:
    family: str
    teacher: dict[str, Any]  # config.json's values
    sizes: Sizes
    micro_batch: int
    is_tied: bool  # the student


@st.composite
def cases(draw: st.DrawFn, *, divisor: int) -> Case:
    """What tensor parallelism splits comes in multiples of `divisor`; the vocabulary is padded, the student whole."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    groups = draw(st.integers(1, 3).filter(lambda groups: groups % divisor == 0))
    heads = groups * draw(st.integers(1, 3))
    step = heads if family == "Llama" else divisor  # transformers 5 has no other Llama
    vocab = draw(st.integers(5, 140) | st.just(128 * divisor))  # the last needs no padding
    has_tied_teacher = draw(st.booleans())
    micro_batch = draw(st.integers(1, 4))
    teacher = {
        "hidden_size": step * draw(st.integers(-(-4 // step), 32 // step)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 2 * draw(st.integers(2, 8)),
        "intermediate_size": divisor * draw(st.integers(1, 40 // divisor)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "vocab_size": vocab,
        "tie_word_embeddings": has_tied_teacher,
        "rope_parameters": draw(st.sampled_from([DEFAULT_ROPE, LLAMA3_ROPE])),
    }
    sizes = Sizes(
        student=draw(st.integers(2, 24)),
        sequence=divisor * draw(st.integers(1, 12 // divisor)),
        batch=micro_batch * draw(st.integers(1, 3)),
        vocab=vocab,
    )
    assume(global_batch(sizes)["loss_mask"].any())
    return Case(family, teacher, sizes, micro_batch, is_tied=has_tied_teacher and draw(st.booleans()))


def examples(number: int) -> settings:
    """Without shrinking, which could start processes for minutes: the shapes are small as they are."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


@pytest.mark.distributed
@pytest.mark.slow
@examples(50)
@given(case=cases(divisor=1))
def test_losses_and_gradients_equal_the_reference_at_any_shape(tmp_path_factory, case):
    assert_equal(case, tmp_path_factory, tp=1)


@pytest.mark.distributed
@pytest.mark.slow
@examples(35)
@given(case=cases(divisor=2))
def test_losses_and_gradients_equal_the_reference_at_any_shape_that_two_ranks_split(tmp_path_factory, case):
    assert_equal(case, tmp_path_factory, tp=2)


def assert_equal(case: Case, tmp_path_factory: pytest.TempPathFactory, *, tp: int) -> None:
    directory = tmp_path_factory.mktemp("teacher")
    model_class, config_class = FAMILIES[case.family]
    _write(directory, model_class, config_class(**case.teacher), dtype=torch.float64)
    layout = Layout(tp=tp, micro=case.micro_batch)
    compare_with_the_reference(str(directory), layout, tied=case.is_tied, sizes=case.sizes)
