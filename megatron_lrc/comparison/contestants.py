"""Who competes: a contestant is a name and training flags. One table; named groups of it; the user's own.

A contestant whose flags this installation does not know is refused by name (`check`), so the table may hold methods
that a version of the package does not have. Its learning rate depends on the teacher, so each has one for every kind
of teacher in `RATES`.
"""

import shlex
from collections.abc import Sequence

from megatron_lrc.comparison.ablations import ABLATIONS, with_layers
from megatron_lrc.comparison.ablations import GROUPS as ABLATION_GROUPS
from megatron_lrc.comparison.contestant import (
    CLOSED_FORM,
    CUT,
    OPENED_RATES,
    PRUNED,
    RANDOM_START,
    RATES,
    RELATIVE_RATES,
    SCRATCH,
    SMALL,
    Contestant,
    Entry,
)
from megatron_lrc.config import ConfigError, parse_config, suggest

#: The contestant whose need for tokens is asked: it gets --ordinary-times as many.
ORDINARY = "ordinary"

CALIBRATION = "--calibration-tokens 16384"
PCA, RIDGE, CHANNEL = (f"--init {init} {CALIBRATION}" for init in ("pca", "ridge", "channel"))
#: The recommended losses, but for the weight of the clone loss.
RELATIVE = "--clone-normalization token --kl-temperature 1"
#: The best of five openings at 300K tokens and one seed (docs/results.md).
OPENED = "--open-after 0.1 --open-matrices all"
#: The width half of Minitron (arXiv 2407.14679, 2408.11796): channels of the residual stream by activation, heads and
#: FFN kept; then all of it trained on the teacher's logits alone, forward KL at temperature 1, which both papers found
#: best.
MINITRON = f"{CHANNEL} --open-after 0 --open-matrices all --alpha 0 --kl-temperature 1"

_METHODS = (
    Entry("lrc-random", "--init random", "LRC as released: random projections", RANDOM_START),
    Entry("lrc-orthogonal", "--init orthogonal", "LRC from a random orthonormal basis", CLOSED_FORM),
    Entry("lrc-channel", CHANNEL, "LRC from the most active channels", CLOSED_FORM),
    Entry("lrc-pca", PCA, "LRC from the teacher's principal components", CLOSED_FORM),
    Entry("lrc-ridge", RIDGE, "LRC from principal components, fitted", CLOSED_FORM),
    Entry("lrc-recommended", "--preset recommended", "LRC as recommended here", ("--lr 1e-3", "")),
    Entry("lrc-closed", f"{RIDGE} {RELATIVE}", "the same start and losses, never opened", RELATIVE_RATES),
    Entry("lrc-opened", f"{PCA} {OPENED}", "lrc-pca, its matrices trained themselves after a tenth", OPENED_RATES),
    Entry("minitron", f"{MINITRON} --lm-weight 0", "the teacher cut to its most active channels, KL loss", CUT),
    Entry("minitron-lm", MINITRON, "the same with the LM loss too", CUT),
    Entry("ordinary", "--method ordinary", "the same student from scratch, LM loss only", SCRATCH),
    Entry("logits", "--method logits", "the same student from scratch, LM and KL loss", SCRATCH),
    Entry("tinybert", "--method tinybert", "the same student from scratch, LM, KL and feature losses", SCRATCH),
    Entry("sheared", "--method sheared", "the teacher pruned, then trained", PRUNED),
)

TABLE = (*_METHODS, *ABLATIONS)

GROUPS = {
    "headline": ("lrc-random", "lrc-pca", ORDINARY),
    "inits": ("lrc-random", "lrc-orthogonal", "lrc-channel", "lrc-pca", "lrc-ridge", ORDINARY),
    "methods": ("lrc-pca", ORDINARY, "logits", "tinybert", "sheared", "lrc-opened", "minitron"),
    "pretrained": ("lrc-recommended", "lrc-random", "lrc-opened", "minitron", "logits", ORDINARY, "sheared"),
    **ABLATION_GROUPS,
}


def contestants(rates: str = SMALL) -> dict[str, Contestant]:
    """By name, with the learning rates for one of RATES."""
    column = RATES.index(rates)
    return {one.name: one.contestant(column) for one in TABLE}


def choose(names: Sequence[str], added: Sequence[str], rates: str = SMALL) -> list[Contestant]:
    """The contestants of these names and groups, in their order, and the user's own (NAME=FLAGS) after them."""
    known = contestants(rates)
    own = []
    for text in added:
        name, equals, flags = text.partition("=")
        if not equals or not name or any(not (sign.isalnum() or sign in "-_.") for sign in name):
            raise ConfigError(
                f'--add {text!r}: expected NAME="FLAGS", the name of letters, digits, "-", "_" and ".", as in --add '
                'wide="--init pca --alpha 0.5".'
            )
        if name in known or name in GROUPS:
            raise ConfigError(f"--add {name}: there is a contestant or group of this name. Give another name.")
        known[name] = Contestant(name, flags, "added")
        own.append(name)
    chosen: list[str] = []
    for name in names:
        if name not in known and name not in GROUPS:
            raise ConfigError(
                f"--contestants {name}: unknown{suggest(name, [*known, *GROUPS])}. Known are {', '.join(known)}, and "
                f"the groups {', '.join(GROUPS)}."
            )
        chosen += GROUPS.get(name, (name,))
    return [known[name] for name in dict.fromkeys([*chosen, *own])]


def check(contestants: Sequence[Contestant]) -> None:
    """Refuse those whose flags this installation does not know, all in one ConfigError."""
    problems = []
    for one in contestants:
        try:
            parse_config(shlex.split(with_layers(one.flags, 8)))
        except ConfigError as error:
            reason = "; ".join(str(error).splitlines())
            problems.append(
                f"contestant {one.name} ({one.flags}): this installation of megatron_lrc does not take its flags: "
                f"{reason}. Leave it out of --contestants, or install a version that has them."
            )
    if problems:
        raise ConfigError("\n".join(problems))
