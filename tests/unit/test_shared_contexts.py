"""Answers side by side after their context have the likelihoods of each on its own."""

from types import SimpleNamespace

import pytest
import torch

from hf_teachers import write_llama, write_qwen2, write_qwen3
from megatron_lrc.evaluation.shared_contexts import _loglikelihood_tokens, can_share, gather, likelihoods

#: (texts, context, continuation): two contexts, an answer that begins another, one that is asked twice.
REQUESTS = [
    (None, [5, 17, 200, 3, 44, 9], [7, 8, 250]),
    (None, [60, 61], [12]),
    (None, [5, 17, 200, 3, 44, 9], [7, 8]),
    (None, [60, 61], [13, 14, 15, 16]),
    (None, [5, 17, 200, 3, 44, 9], [100]),
    (None, [60, 61], [12]),
]


@torch.no_grad()
def alone(model, context: list[int], answer: list[int]) -> float:
    log_p = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
    return sum(log_p[len(context) - 1 + place, token].item() for place, token in enumerate(answer))


@pytest.mark.parametrize("write", [write_llama, write_qwen2, write_qwen3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_likelihoods_are_those_of_one_sequence_for_each_answer(tmp_path, write, attention) -> None:
    model = write(tmp_path / "model")
    model.set_attn_implementation(attention)
    assert can_share(model)
    harness = SimpleNamespace(model=model, max_length=64, batch_size=2)
    found = [score for score, _ in _loglikelihood_tokens(harness, REQUESTS, disable_tqdm=True)]
    expected = [alone(model, context, answer) for _, context, answer in REQUESTS]
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1, "the answers do not tell the places apart"


def test_the_likeliest_answer_is_seen_as_such(tmp_path) -> None:
    model = write_llama(tmp_path / "model")
    with torch.no_grad():
        best = model(torch.tensor([[60, 61]])).logits[0, -1].argmax().item()
    other = (best + 1) % 301
    [[first, second]] = likelihoods(model, gather([(None, [60, 61], [best]), (None, [60, 61], [other])], 64))
    assert (first[1], second[1]) == (True, False)


def test_a_question_costs_its_context_once() -> None:
    lengths = [question.length for question in gather(REQUESTS, 64)]
    assert lengths == [6 + 2 + 1, 2 + 3]


def test_what_is_too_long_is_cut_from_the_left_as_the_harness_cuts_it() -> None:
    """A model of 4 tokens reads 4 and predicts the fifth."""
    questions = gather([(None, [1, 2, 3, 4, 5], [6]), (None, [1, 2, 3, 4, 5], [6, 7])], 4)
    assert [(question.context, list(question.answers)) for question in questions] == [
        ((2, 3, 4, 5), [(6,)]),
        ((3, 4, 5), [(6, 7)]),
    ]


def test_a_model_with_windows_is_left_to_the_harness(tmp_path) -> None:
    """Its layers would ignore them under a mask of ours."""
    model = write_llama(tmp_path / "model")
    model.config.sliding_window = 8
    assert not can_share(model)
    model.config.use_sliding_window = False
    assert can_share(model)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert not can_share(model)
