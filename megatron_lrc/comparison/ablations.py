"""Contestants that change one thing each in another one, which stands beside them as the row with everything.

`ablations` change `lrc-pca`; the others `lrc-random`, which is the paper's setting.
"""

import re

from megatron_lrc.comparison.contestant import CLOSED_FORM, RANDOM_START, Entry
from megatron_lrc.config import CLONE_TERMS

ABLATED, PAPER = "lrc-pca", "lrc-random"
_PCA, _RANDOM = "--init pca --calibration-tokens 16384", "--init random"

ATTENTION, FFN = ("q", "k", "v", "o"), ("gate", "up", "down")


def _of_pca(name: str, changed: str, about: str) -> Entry:
    return Entry(name, _PCA, about, CLOSED_FORM, changed)


def _of_random(name: str, changed: str, about: str) -> Entry:
    return Entry(name, _RANDOM, about, RANDOM_START, changed)


def _terms_without(*left_out: str) -> str:
    return f"--clone-terms {' '.join(term for term in CLONE_TERMS if term not in left_out)}"


_OF_PCA = (
    *(_of_pca(f"without-{term}", _terms_without(term), f"no clone loss of {term}") for term in CLONE_TERMS),
    _of_pca("without-clone", "--alpha 0", "no clone loss at all"),
    _of_pca("without-kl", "--kl-weight 0", "no KL loss"),
    _of_pca("without-lm", "--lm-weight 0", "no LM loss"),
    _of_pca("tau-1", "--kl-temperature 1", "KL temperature 1 instead of 40"),
    _of_pca("tau-10", "--kl-temperature 10", "KL temperature 10 instead of 40"),
    _of_pca("alpha-0.02", "--alpha 0.02", "a tenth of the clone loss"),
    _of_pca("alpha-2", "--alpha 2", "ten times the clone loss"),
)

_OF_PAPER = (
    _of_random("random-without-gate", _terms_without("gate"), "no clone loss of gate"),
    _of_random("random-without-down", _terms_without("down"), "no clone loss of down"),
    _of_random("random-without-attention", _terms_without(*ATTENTION), "no clone loss of q, k, v, o"),
    _of_random("random-without-ffn", _terms_without(*FFN), "no clone loss of gate, up, down"),
    _of_random("random-without-clone", "--alpha 0", "no clone loss at all"),
)

#: Name of a share of the layers -> every how manieth layer is in it.
SHARES = {"half": 2, "quarter": 4, "eighth": 8}
_OF_LAYERS = tuple(
    _of_random(
        f"random-{share}-of-layers",
        f"--clone-terms {' '.join(f'{term}:{{{share}}}' for term in CLONE_TERMS)}",
        f"clone loss in every {every}th layer" if every > 2 else "clone loss in every second layer",
    )
    for share, every in SHARES.items()
)

ALPHAS = (0.002, 0.02, 0.06, 0.6, 2.0)
_OF_ALPHA = tuple(
    _of_random(f"random-alpha-{alpha:g}", f"--alpha {alpha:g}", f"weight of the clone loss {alpha:g} instead of 0.2")
    for alpha in ALPHAS
)

ABLATIONS = (*_OF_PCA, *_OF_PAPER, *_OF_LAYERS, *_OF_ALPHA)

GROUPS = {
    "ablations": (ABLATED, *(one.name for one in _OF_PCA)),
    "paper-ablations": (PAPER, *(one.name for one in _OF_PAPER)),
    "layers": (PAPER, *(one.name for one in _OF_LAYERS)),
    "alphas": ("random-without-clone", PAPER, *(one.name for one in _OF_ALPHA)),
}


def with_layers(flags: str, num_layers: int) -> str:
    """Flags with the layers of a teacher in the place of `{half}`, `{quarter}` and `{eighth}`, evenly spread: the last
    of every 2, 4 or 8, or of all where there are fewer."""

    def layers(found: re.Match[str]) -> str:
        every = min(SHARES[found[1]], num_layers)
        return ",".join(map(str, range(every - 1, num_layers, every)))

    return re.sub(rf"\{{({'|'.join(SHARES)})\}}", layers, flags)
