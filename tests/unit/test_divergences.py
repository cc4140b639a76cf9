"""Divergences on plain tensors against the same formulas on materialised logits, by autograd in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config_cases import change
from megatron_lrc.clone.vocab_parallel import HeadLossSettings, HeadSums, lm_and_kl_loss
from megatron_lrc.clone.vocabulary_shard import VocabularyShard
from megatron_lrc.config import ConfigError, parse_divergence, validate
from megatron_lrc.methods import method_of
from reference import divergence

TOKENS, STUDENT, TEACHER, VOCAB, PADDED = 13, 6, 9, 21, 32
KINDS = ["forward", "reverse", "jsd:0.1", "jsd:0.7"]


@pytest.fixture
def problem() -> list[Tensor]:
    torch.manual_seed(0)
    student, teacher = torch.randn(TOKENS, STUDENT, dtype=torch.double), torch.randn(TOKENS, TEACHER).double()
    heads = torch.randn(PADDED, STUDENT, dtype=torch.double), torch.randn(PADDED, TEACHER).double()
    return [student * 2, teacher * 2, *heads, torch.randint(VOCAB, (TOKENS,)), (torch.rand(TOKENS) > 0.3).double()]


def found(problem: list[Tensor], kind: str, **settings) -> tuple[HeadSums, list[Tensor]]:
    """Sums, and gradients of the student's hidden states and head."""
    student, teacher, student_head, teacher_head, labels, weight = problem
    student, student_head = student.requires_grad_(), student_head.requires_grad_()
    loss, sums = lm_and_kl_loss(
        student,
        teacher,
        student_head,
        teacher_head,
        labels,
        weight,
        shard=VocabularyShard.of(min(VOCAB, len(student_head)), len(student_head), None),
        settings=HeadLossSettings(beta=parse_divergence(kind), chunk_tokens=5, **settings),
    )
    if not torch.is_grad_enabled():
        return sums, []
    return sums, list(torch.autograd.grad(loss, (student, student_head)))


def expected(problem: list[Tensor], kind: str, *, lm: float, kl: float, temperature: float, top_k: int, cap: float):
    """(LM loss, divergence, gradients) of all logits at once."""
    student, teacher, student_head, teacher_head, labels, weight = problem
    student, student_head = student.requires_grad_(), student_head.requires_grad_()
    logits = [student @ student_head[:VOCAB].t(), teacher @ teacher_head[:VOCAB].t()]
    if cap:
        logits = [cap * (x / cap).tanh() for x in logits]
    of_student, of_teacher = ((x / temperature).log_softmax(-1) for x in logits)
    lm_loss = F.cross_entropy(logits[0], labels, reduction="none") @ weight
    value = temperature**2 * (divergence(of_teacher, of_student, kind, top_k or None) @ weight)
    return lm_loss, value, torch.autograd.grad(lm * lm_loss + kl * value, (student, student_head))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [0, 1, 4, 20])
@pytest.mark.parametrize("temperature, cap", [(1.0, 0.0), (40.0, 0.0), (2.0, 5.0)])
def test_value_and_gradient_are_those_of_materialised_logits(problem, kind, top_k, temperature, cap):
    weights = {"lm": 0.3, "kl": 1.7, "temperature": temperature, "top_k": top_k}
    sums, grads = found(problem, kind, **weights, logits_soft_cap=cap)
    lm, value, reference = expected(problem, kind, **weights, cap=cap)
    torch.testing.assert_close(sums.lm, lm)
    torch.testing.assert_close(sums.kl, value, rtol=1e-10, atol=1e-12)
    for grad, wanted in zip(grads, reference, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [0, 4])
def test_a_validation_has_the_same_value_and_what_the_teacher_gives_its_top_k(problem, kind, top_k):
    settings = {"lm": 1.0, "kl": 1.0, "temperature": 2.0, "top_k": top_k}
    trained, _ = found(problem, kind, **settings)
    with torch.no_grad():
        sums, _ = found(problem, kind, **settings)
    torch.testing.assert_close(sums.kl, trained.kl)
    logits = [hidden @ head[:VOCAB].t() for hidden, head in zip(problem[:2], problem[2:4], strict=True)]
    mass = (logits[1] / 2).softmax(-1).topk(top_k).values.sum(-1) @ problem[-1]
    torch.testing.assert_close(sums.covered, mass.to(sums.covered))
    plain = divergence(logits[1].log_softmax(-1), logits[0].log_softmax(-1), "forward") @ problem[-1]
    torch.testing.assert_close(sums.teacher_kl, plain)  # whatever the loss is
    assert sums.same_top1 == (logits[0].argmax(-1) == logits[1].argmax(-1)).double() @ problem[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [0, 4])
def test_digits_are_kept_in_fp32_where_the_two_nearly_agree(problem, kind, top_k):
    """At temperature 40 values near 1e-3 are made of logarithms near 3, and at 1,000 they are near 1e-6."""
    for temperature, tolerance in ((40.0, 2e-5), (1000.0, 5e-3)):
        settings = {"lm": 0.0, "kl": 1.0, "temperature": temperature, "top_k": top_k}
        wide, wide_grads = found(problem, kind, **settings)
        narrow, grads = found([x.detach().float() if x.is_floating_point() else x for x in problem], kind, **settings)
        torch.testing.assert_close(narrow.kl.double(), wide.kl, rtol=tolerance, atol=0)
        for grad, wanted in zip(grads, wide_grads, strict=True):
            assert (grad - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("distance", [60.0, 1e4])
def test_logits_far_apart_give_finite_gradients(kind, top_k, distance):
    """Each model is sure of another token than the other."""
    head = torch.eye(4)
    hidden = torch.eye(4)[:2] * distance
    problem = [hidden.clone(), hidden.flip(0).clone(), head.clone(), head.clone(), torch.tensor([0, 1]), torch.ones(2)]
    sums, grads = found(problem, kind, lm=0.0, kl=1.0, temperature=1.0, top_k=top_k)
    assert sums.kl.isfinite() and sums.kl > 0
    assert all(grad.isfinite().all() for grad in grads)


def test_top_k_is_never_more_than_all():
    torch.manual_seed(1)
    of_teacher, of_student = torch.randn(2, 50, 30).double().log_softmax(-1)
    for kind in KINDS:
        whole = divergence(of_teacher, of_student, kind)
        assert (divergence(of_teacher, of_student, kind, 5) <= whole + 1e-12).all()


@pytest.mark.parametrize("text", ["", "kl", "jsd", "jsd:", "jsd:0", "jsd:1", "jsd:x", "jsd:nan", "forward:1"])
def test_other_words_are_refused(valid_config, text):
    change(valid_config, kl_divergence=text)
    with pytest.raises(ConfigError, match=f"--kl-divergence {text}: expected is forward, reverse, or jsd:BETA"):
        validate(method_of(valid_config), world_size=1)
