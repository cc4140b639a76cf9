"""Stage 2: the operators that take another path on CUDA, each against the same in fp64.

Limits are those of the arithmetic. Products of bf16 are exact in fp32, so that only the order of the sums differs (1e-5
is far above that, and far below one rounding to bf16, 4e-3); what is rounded to bf16 once may be off by 4e-3.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_check.checks import Bound, Check, Checks, Figures
from benchmarks.gpu_check.settings import Settings
from megatron_lrc.clone.losses import CloneLoss, squared_errors
from megatron_lrc.clone.products import add_product, has_wide_gemm, product_with_gradient, wide_product
from megatron_lrc.clone.projections import gradient_of
from megatron_lrc.clone.sites import LAYER_SITES, HeadLayout
from megatron_lrc.clone.vocab_parallel import HeadLossSettings, lm_and_kl_loss
from megatron_lrc.clone.vocabulary_shard import VocabularyShard

EXACT, ROUNDED, SEVERAL_ROUNDINGS = 1e-5, 4e-3, 1e-2
TEMPERATURE = 40.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def checks(settings: Settings) -> Checks:
    generator = torch.Generator(settings.device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=settings.device)).to(dtype)

    tokens, wide, vocabulary = (24, 32, 96) if settings.is_tiny else (512, 3072, 32768)
    for name, dtype in DTYPES.items():
        given = partial(draw, dtype=dtype)
        yield Check(f"{name}: wide products", lambda given=given: wide_gemms(given, tokens, wide, vocabulary))
        yield Check(f"{name}: LM and KL losses", lambda given=given: head(given, tokens, wide, vocabulary))
        yield Check(f"{name}: clone loss", lambda given=given: clone_loss(given, tokens, wide))
    yield Check("bf16: causal attention, lower right, grouped", lambda: attention(settings, draw))


def difference(found: Tensor, expected: Tensor) -> float:
    """Of norms, relative to what is expected, which is fp64."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def in_fp64(*tensors: Tensor) -> list[Tensor]:
    """Copies; leaves that gather gradients where the originals do."""
    return [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]


def wide_gemms(draw: Callable[..., Tensor], tokens: int, wide: int, vocabulary: int) -> Figures:
    """`clone/products.py`: results in fp32 of operands in bf16, and a gradient that meets a weight."""
    hidden, head = draw(tokens, wide), draw(vocabulary, wide)
    total = torch.empty(wide, vocabulary, device=hidden.device)  # fp32
    left, right = draw(wide, tokens), draw(tokens, vocabulary)
    for is_first in (True, False):
        add_product(total, left, right, is_first=is_first)
    gradient = draw(wide, tokens, dtype=torch.float32)
    is_half = hidden.dtype == torch.bfloat16
    exact = [tensor.double() for tensor in (hidden, head, left, right, gradient)]
    return {
        "hidden by head": Bound(difference(wide_product(hidden, head), exact[0] @ exact[1].t()), EXACT),
        "added to a total": Bound(
            difference(total, 2 * exact[2] @ exact[3]),
            ROUNDED if is_half and not (hidden.is_cuda and has_wide_gemm()) else EXACT,
        ),
        "weight by gradient": Bound(
            difference(product_with_gradient(head, gradient), exact[1] @ exact[4]),
            ROUNDED if is_half and hidden.is_cuda else EXACT,
        ),
        "GEMM of bf16 with results in fp32": hidden.is_cuda and has_wide_gemm(),
    }


def head(draw: Callable[..., Tensor], tokens: int, wide: int, vocabulary: int) -> Figures:
    """`lm_and_kl_loss` beside full logits and autograd in fp64. The KL is a small sum of large summands."""
    narrow = wide // 2
    given = (
        draw(tokens, narrow).requires_grad_(),
        draw(tokens, wide),
        draw(vocabulary, narrow, scale=2 * narrow**-0.5).requires_grad_(),
        draw(vocabulary, wide, scale=2 * wide**-0.5),
    )
    labels = torch.arange(tokens, device=given[0].device) * 7 % vocabulary
    weight = torch.ones(tokens, device=labels.device)
    student_head = given[2]
    if student_head.dtype != torch.float32:  # as composed and trained matrices have one: the gradient goes there
        student_head.main_grad = torch.zeros_like(student_head, dtype=torch.float32)  # type: ignore[attr-defined]
    found, sums = lm_and_kl_loss(
        *given,
        labels,
        weight,
        shard=VocabularyShard.of(vocabulary, vocabulary, None),
        settings=HeadLossSettings(lm=1.0, kl=1.0, temperature=TEMPERATURE, chunk_tokens=max(tokens // 2, 1)),
    )
    found.backward()
    exact = in_fp64(*given)
    logits = exact[0] @ exact[2].t()
    lm = F.cross_entropy(logits, labels, reduction="sum")
    log_student, log_teacher = (F.log_softmax(z / TEMPERATURE, -1) for z in (logits, exact[1] @ exact[3].t()))
    kl = TEMPERATURE**2 * F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    (lm + kl).backward()
    limit = EXACT if given[0].dtype == torch.float32 else SEVERAL_ROUNDINGS
    gradients = {"hidden states' gradient": 0, "head's gradient": 2}
    return {
        "LM": Bound(abs(sums.lm.item() / lm.item() - 1), EXACT),
        "KL": Bound(abs(sums.kl.item() / kl.item() - 1), 1e-3),
        **{name: Bound(difference(_grad(given[at]), _grad(exact[at])), limit) for name, at in gradients.items()},
    }


def clone_loss(draw: Callable[..., Tensor], tokens: int, features: int) -> Figures:
    """`CloneLoss` of two sites side by side; backward, what comes from above is added to. Given as the student's
    activation."""
    sites = tuple(site for site in LAYER_SITES if site.name in ("gate", "up"))
    given = (draw(tokens, 1, 2 * features).requires_grad_(), draw(tokens, 1, 2 * features).requires_grad_())
    weight = torch.arange(2 * tokens, device=given[0].device).remainder(3).float().view(tokens, 1, 2)
    places, scale = (sites, HeadLayout(1, 1), 1), 0.2
    with torch.no_grad():
        loss = (squared_errors(*given, *places) * weight).sum()
    above = draw(tokens, 1, 2 * features)
    (CloneLoss.apply(*given, weight, *places, scale) * above).sum().backward()
    student, target = in_fp64(*given)
    errors = (student - target).unflatten(-1, (2, features)).square().mean(-1)
    error = (errors * weight.double()).sum()
    (scale * error + (student * above.double()).sum()).backward()
    limit = EXACT if given[0].dtype == torch.float32 else SEVERAL_ROUNDINGS
    return {
        "loss": Bound(abs(loss.item() / error.item() - 1), limit),
        "student's gradient": Bound(difference(_grad(given[0]), _grad(student)), limit),
        "target's gradient": Bound(difference(_grad(given[1]), _grad(target)), limit),
    }


def attention(settings: Settings, draw: Callable[..., Tensor]) -> Figures:
    """torch's attention as `mcore/attention.py` asks for it where queries are the last of the keys' tokens."""
    keys, heads, groups, width = (16, 4, 2, 16) if settings.is_tiny else (1024, 24, 8, 128)
    given = tuple(
        draw(2, number, size, width).requires_grad_()
        for number, size in ((heads, keys // 2), (groups, keys), (groups, keys))
    )
    hidden = torch.ones(keys // 2, keys, dtype=torch.bool, device=settings.device).triu(keys - keys // 2 + 1)
    mask = _lower_right(keys) if settings.is_cuda else ~hidden
    found = F.scaled_dot_product_attention(*given, attn_mask=mask, enable_gqa=True)
    above = draw(*found.shape)
    (found * above).sum().backward()
    query, key, value = exact = in_fp64(*given)
    key, value = (part.repeat_interleave(heads // groups, dim=1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) * width**-0.5
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
    (expected * above.double()).sum().backward()
    names = ("queries' gradient", "keys' gradient", "values' gradient")
    return {
        "output": Bound(difference(found, expected.detach()), SEVERAL_ROUNDINGS),
        **{
            name: Bound(difference(_grad(ours), _grad(theirs)), 2 * SEVERAL_ROUNDINGS)
            for name, ours, theirs in zip(names, given, exact, strict=True)
        },
    }


def _lower_right(keys: int) -> Any:
    """The last half of the tokens, each with all before it. Imported here: it loads torch.compile's front end."""
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(keys // 2, keys)


def _grad(leaf: Tensor) -> Tensor:
    gradient = gradient_of(leaf)
    assert gradient is not None, "backward has reached it"
    return gradient
