"""The losses on plain tensors against the same formulas written with torch's own softmax and autograd."""

import pytest
import torch
import torch.nn.functional as F

from megatron_lrc.clone import vocab_parallel
from megatron_lrc.clone.energy import TypicalEnergy, relative_weights
from megatron_lrc.clone.losses import CarryLoss, CloneLoss, mean_squares, squared_errors
from megatron_lrc.clone.products import wide_product
from megatron_lrc.clone.projections import accumulate_in_fp32
from megatron_lrc.clone.sites import LAYER_SITES, HeadLayout, select
from megatron_lrc.clone.vocab_parallel import HeadLossSettings, HeadSums, lm_and_kl_loss
from megatron_lrc.clone.vocabulary_shard import VocabularyShard
from megatron_lrc.mcore.stages import LossSums

TOKENS, STUDENT, TEACHER, VOCAB, PADDED = 13, 6, 9, 21, 32


def naive_losses(student_logits, teacher_logits, labels, weight, temperature):
    lm = (F.cross_entropy(student_logits, labels, reduction="none") * weight).sum()
    log_student = F.log_softmax(student_logits / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    kl = F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(-1)
    return lm, temperature**2 * (kl * weight).sum()


def random_problem(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).mul(scale).to(dtype)

    student_hidden, student_head = normal(TOKENS, STUDENT).requires_grad_(), normal(PADDED, STUDENT).requires_grad_()
    teacher_hidden, teacher_head = normal(TOKENS, TEACHER), normal(PADDED, TEACHER)
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    weight = (torch.rand(TOKENS, generator=generator) > 0.3).to(dtype)
    return student_hidden, student_head, teacher_hidden, teacher_head, labels, weight


@pytest.mark.parametrize("temperature", [1.0, 40.0])
@pytest.mark.parametrize("chunk_tokens", [4, 100])
@pytest.mark.parametrize("lm_weight, kl_weight, divisor", [(1.0, 0.0, 1.0), (0.6, 1.3, 2.5), (0.0, 1.3, 1.0)])
def test_chunked_losses_and_gradients_equal_materialised_ones(temperature, chunk_tokens, lm_weight, kl_weight, divisor):
    """divisor: of both models' logits."""
    student_hidden, student_head, teacher_hidden, teacher_head, labels, weight = random_problem(
        torch.float64, scale=3.0
    )
    total, sums = lm_and_kl_loss(
        student_hidden,
        teacher_hidden,
        student_head,
        teacher_head,
        labels,
        weight,
        shard=VocabularyShard.of(VOCAB, PADDED, None),
        settings=HeadLossSettings(lm_weight, kl_weight, temperature, chunk_tokens, logits_scaling=divisor),
    )
    grads = torch.autograd.grad(total * 0.7, (student_hidden, student_head))

    expected_lm, expected_kl = naive_losses(
        student_hidden @ student_head[:VOCAB].t() / divisor,
        teacher_hidden @ teacher_head[:VOCAB].t() / divisor,
        labels,
        weight,
        temperature,
    )
    expected = torch.autograd.grad(
        (lm_weight * expected_lm + kl_weight * expected_kl) * 0.7, (student_hidden, student_head)
    )
    torch.testing.assert_close(sums.lm, expected_lm)
    if kl_weight:
        torch.testing.assert_close(sums.kl, expected_kl)
        own = F.cross_entropy(teacher_hidden @ teacher_head[:VOCAB].t() / divisor, labels, reduction="none") @ weight
        torch.testing.assert_close(sums.teacher_lm, own)
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_a_validation_makes_no_gradients_and_has_the_teachers_loss_and_agreement_too(monkeypatch, kl_weight):
    """A parameter says that it needs a gradient also where autograd is off."""
    monkeypatch.setattr(vocab_parallel, "add_product", lambda *_: pytest.fail("a gradient was made"))
    tokens, vocab = 40, 11
    torch.manual_seed(3)
    student, teacher = torch.randn(tokens, 3), torch.randn(tokens, 4)
    heads = torch.nn.Parameter(torch.randn(vocab, 3)), torch.randn(vocab, 4)
    labels, weight = torch.randint(vocab, (tokens,)), (torch.arange(tokens) < 30).float()
    settings = HeadLossSettings(lm=1.0, kl=kl_weight, temperature=40.0, chunk_tokens=3)
    with torch.no_grad():
        _, sums = lm_and_kl_loss(
            student, teacher, *heads, labels, weight, shard=VocabularyShard.of(vocab, vocab, None), settings=settings
        )
    logits = [hidden[:30] @ head.t() for hidden, head in zip((student, teacher), heads, strict=True)]
    assert sums.teacher_lm.item() == pytest.approx(F.cross_entropy(logits[1], labels[:30], reduction="sum").item())
    own, others = (each.log_softmax(-1) for each in logits)
    assert sums.teacher_kl.item() == pytest.approx(F.kl_div(own, others, log_target=True, reduction="sum").item())
    num_same = (logits[0].argmax(1) == logits[1].argmax(1)).sum().item()
    assert 0 < sums.same_top1.item() == num_same < 30


def test_sums_are_found_by_name_only():
    scalars = dict(zip(HeadSums.names(), torch.arange(1.0, 7.0), strict=True))
    sums = LossSums(torch.device("cpu"))
    for _ in range(2):
        sums.add_main(HeadSums(**scalars), torch.ones(3, 2))
    found = {name: value.item() for name, value in sums.main.named().items()}
    assert found == {"lm": 2, "kl": 4, "teacher_lm": 6, "teacher_kl": 8, "same_top1": 10, "covered": 12, "tokens": 12}
    with pytest.raises(TypeError):
        sums.main[3]
    sums.reset()
    assert not sums.main.tokens and not sums.main_values.any()


def test_kl_at_temperature_40_keeps_its_digits_in_fp32():
    wide = random_problem(torch.float64)
    narrow = [x.detach().float() if x.is_floating_point() else x for x in wide]
    results = []
    for student_hidden, student_head, teacher_hidden, teacher_head, labels, weight in (wide, narrow):
        student_hidden = student_hidden.detach().requires_grad_()
        _, sums = lm_and_kl_loss(
            student_hidden,
            teacher_hidden,
            student_head,
            teacher_head,
            labels,
            weight,
            shard=VocabularyShard.of(VOCAB, PADDED, None),
            settings=HeadLossSettings(1.0, 1.0, 40.0, 5),
        )
        results.append((sums.lm.double(), sums.kl.double()))
    torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_attached_clone_loss_adds_the_gradient_of_masked_mse_per_site(dtype, tolerance):
    heads = HeadLayout(head_dim=4, queries_per_group=3)
    sites = tuple(site for site in LAYER_SITES if site.name in "qkv")
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(5, 2, 40, generator=generator, dtype=dtype).requires_grad_()
    target = torch.randn(5, 2, 40, generator=generator, dtype=dtype).requires_grad_()
    mask = (torch.rand(5, 2, generator=generator) > 0.4).to(dtype)

    weight = mask.unsqueeze(-1).expand(5, 2, 3)
    attached = CloneLoss.apply(student, target, weight, sites, heads, 1, 0.2)
    assert torch.equal(attached, student)
    grads = torch.autograd.grad(attached.sin().sum(), (student, target))

    def squared_error(site):
        error = select(site, student, heads, -1) - select(site, target, heads, -1)
        return error.flatten(2).square().mean(-1)

    errors = torch.stack([squared_error(site) for site in sites], -1)
    loss = (errors * weight).sum()
    expected = torch.autograd.grad(student.sin().sum() + 0.2 * loss, (student, target))
    for found, reference in zip(
        (squared_errors(student, target, sites, heads, 1), *grads), (errors, *expected), strict=True
    ):
        torch.testing.assert_close(found, reference, rtol=tolerance, atol=tolerance)


def test_each_site_of_a_fused_output_has_tokens_weights_of_its_own():
    heads = HeadLayout(head_dim=4, queries_per_group=3)
    sites = tuple(site for site in LAYER_SITES if site.name in "qv")  # k is off
    generator = torch.Generator().manual_seed(1)
    student, target = (torch.randn(5, 2, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    weight = torch.rand(5, 2, 2, generator=generator, dtype=torch.float64)
    attached = CloneLoss.apply(student, target, weight, sites, heads, 2, 0.2)  # half of the features are on this rank
    (grad,) = torch.autograd.grad(attached.sum(), student)

    def weighted_mse(number, site):
        error = select(site, student, heads, -1) - select(site, target, heads, -1)
        return (error.flatten(2).square().mean(-1) / 2 * weight[..., number]).sum()

    terms = [weighted_mse(number, site) for number, site in enumerate(sites)]
    torch.testing.assert_close((squared_errors(student, target, sites, heads, 2) * weight).sum(), sum(terms))
    torch.testing.assert_close(grad, torch.autograd.grad(student.sum() + 0.2 * sum(terms), student)[0])


def test_a_massive_token_and_a_tiny_one_weigh_no_more_than_others():
    """Relative to its own energy above what is typical, which neither of the two moves much; to that below it."""
    heads, sites = HeadLayout(4, 1), tuple(site for site in LAYER_SITES if site.name == "down")
    target = torch.ones(101, 1, 8)
    target[0], target[1] = 1000.0, 0.001
    weight = torch.ones(101, 1)
    weight[2] = 0.0  # masked
    energy, error = (mean_squares(output, sites, heads, 2) for output in (target, 0.1 * target))
    typical = TypicalEnergy(3, torch.device("cpu"))
    typical.add(torch.tensor([1]), energy[:50], weight[:50])
    typical.add(torch.tensor([1]), energy[50:], weight[50:])
    assert typical.result().tolist() == pytest.approx([0.0, 1.0, 0.0])
    for found in relative_weights(weight, error, energy, typical.result()[[1]]):
        assert found[:4, 0, 0].tolist() == pytest.approx([1e-6, 1.0, 0.0, 1.0])
    no_token_was_seen = torch.zeros(1)
    assert all(found.eq(0).all() for found in relative_weights(weight, error, energy, no_token_was_seen))


def test_a_token_whose_error_is_massive_pulls_no_more_than_one_that_misses_its_target():
    """The student's own massive activation, where the teacher has none: Huber's loss of the relative distance."""
    energy = torch.ones(4, 1, 1)
    distance = torch.tensor([0.5, 1.0, 2.0, 30.0]).view(4, 1, 1)
    weights = relative_weights(torch.ones(4, 1), distance.square(), energy, torch.ones(1))
    loss, gradient = (weight * distance.square() for weight in weights)
    assert loss.flatten().tolist() == pytest.approx([0.25, 1.0, 3.0, 59.0])
    assert (gradient / distance).flatten().tolist() == pytest.approx([0.5, 1.0, 1.0, 1.0])


def test_a_branch_beside_an_activation_gets_its_losses_gradient():
    activation, branch = (torch.randn(3, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    sites = tuple(site for site in LAYER_SITES if site.name == "down")
    with_loss = CloneLoss.apply(branch, torch.zeros(3, 2, 4), torch.ones(3, 2, 1), sites, HeadLayout(4, 1), 1, 0.5)
    grads = torch.autograd.grad(CarryLoss.apply(activation, with_loss).sin().sum(), (activation, branch))
    torch.testing.assert_close(grads[0], activation.cos())
    torch.testing.assert_close(grads[1], 0.5 * 2 * branch.detach() / 4)


def kl_gradient(hidden, dtype, *, loss_scale=1.0):
    """Gradient of the KL at tau = 40 by the student's hidden state, times loss_scale, from inputs rounded to bf16."""
    student_hidden, student_head, teacher_hidden, teacher_head = (x.bfloat16().to(dtype) for x in hidden)
    student_hidden.requires_grad_()
    total, _ = lm_and_kl_loss(
        student_hidden,
        teacher_hidden,
        student_head,
        teacher_head,
        torch.zeros(len(student_hidden), dtype=torch.long),
        torch.ones(len(student_hidden)),
        shard=VocabularyShard.of(len(student_head), len(student_head), None),
        settings=HeadLossSettings(lm=0.0, kl=1.0, temperature=40.0, chunk_tokens=16, loss_scale=loss_scale),
    )
    (grad,) = torch.autograd.grad(total * loss_scale, student_hidden)
    return grad.double()


@pytest.fixture
def near_twins():
    """A student whose logits are the teacher's (of spread 8) within 0.05: late in training, where the KL is small.

    Logits rounded to bf16, as a bf16 GEMM gives them, bring the cosine of the gradient to 0.71 here; to fp16, to 0.99.
    """
    generator = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(40, 64, generator=generator), torch.randn(9000, 64, generator=generator)
    return hidden, head + torch.randn(9000, 64, generator=generator) / 400, hidden, head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_get_the_kl_gradient_of_wide_ones(near_twins, dtype):
    exact, narrow = kl_gradient(near_twins, torch.float64), kl_gradient(near_twins, dtype)
    assert F.cosine_similarity(exact, narrow, dim=-1).min() > 0.9999


def test_logits_rounded_to_bf16_turn_the_kl_gradient_by_45_degrees(near_twins, monkeypatch):
    """Why they are not: what is claimed in ARCHITECTURE.md."""
    exact = kl_gradient(near_twins, torch.float64)
    monkeypatch.setattr(vocab_parallel, "wide_product", lambda hidden, rows: (hidden @ rows.t()).float())
    rounded = kl_gradient(near_twins, torch.bfloat16)
    assert 0.6 < F.cosine_similarity(exact, rounded, dim=-1).min() < 0.8


def test_loss_scaling_saves_fp16_gradients_that_would_vanish(near_twins):
    exact = kl_gradient(near_twins, torch.float64)
    plain, scaled = (kl_gradient(near_twins, torch.float16, loss_scale=scale) / scale for scale in (1.0, 4096.0))
    errors = [((grad - exact).norm() / exact.norm()).item() for grad in (plain, scaled)]
    assert errors[1] < 1e-3 < errors[0] / 5, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_are_not_rounded_to_the_dtype_of_their_operands(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 200, generator=generator).to(dtype)
    rows = torch.randn(10000, 200, generator=generator).to(dtype)  # more than are widened at once
    product = wide_product(hidden, rows)
    assert product.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(product.double(), hidden.double() @ rows.double().t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("is_embedding", [False, True])
def test_the_heads_gradient_gathers_in_fp32_beside_what_autograd_brings(is_embedding):
    """Over two micro-batches, as of a composed head; of a tied one the embedding's gradient comes besides."""
    student_hidden, head, teacher_hidden, teacher_head, labels, weight = random_problem(torch.float32)
    narrow = head.detach().bfloat16().requires_grad_()
    accumulate_in_fp32(narrow)
    settings = HeadLossSettings(1.0, 1.0, 1.0, 5)

    def losses(head, hidden):
        own = hidden.to(head.dtype) + (head[labels] if is_embedding else 0)
        teacher = teacher_hidden.to(head.dtype), teacher_head.to(head.dtype)
        shard = VocabularyShard.of(VOCAB, PADDED, None)
        how = {"shard": shard, "settings": settings, "is_embedding": is_embedding}
        return lm_and_kl_loss(own, teacher[0], head, teacher[1], labels, weight, **how)[0]

    wide = narrow.detach().float().requires_grad_()
    for scale in (1.0, 0.5):
        hidden = (student_hidden.detach() * scale).bfloat16()
        losses(narrow, hidden).backward()
        losses(wide, hidden.float()).backward()
    assert narrow.grad is None and wide.grad.abs().max() > 0.1
    assert (narrow.main_grad - wide.grad).norm() < 0.02 * wide.grad.norm()
    with pytest.raises(RuntimeError, match="backward has to begin with the loss scale"):
        (losses(narrow, hidden) * 2).backward()
