"""Who competes: a contestant is a name and training flags. One table; named groups of it; the user's own.

A contestant whose flags this installation does not know is refused by name (`check`), so the table may hold methods
that a version of the package does not have.

The ablations change one thing each in `lrc-pca`, which stands beside them as the row with everything.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lrc.config import CLONE_TERMS, ConfigError, parse_config, suggest

#: The contestant whose need for tokens is asked: it gets --ordinary-times as many.
ORDINARY = "ordinary"
ABLATED = "lrc-pca"


@dataclass(frozen=True, slots=True)
class Contestant:
    """flags: what it adds to the flags of all. about: a few words for the table."""

    name: str
    flags: str
    about: str


#: Peak learning rates: the best of 1e-3, 3e-3 and 1e-2 for lrc-pca, lrc-random and ordinary on the default material
#: (--tokens 100000 --lr-grid 1e-3 3e-3 1e-2). The others have that of the nearest of them.
LRC, RANDOM, WHOLE = "--lr 1e-3", "--lr 3e-3", "--lr 3e-3"
PCA = "--init pca --calibration-tokens 16384"
#: The best of five at 300K tokens and one seed (docs/results.md).
OPENED = "--open-after 0.1 --open-matrices all --open-lr 3e-3"

_METHODS = (
    Contestant("lrc-random", f"--init random {RANDOM}", "LRC as released: random projections"),
    Contestant("lrc-orthogonal", f"--init orthogonal {LRC}", "LRC from a random orthonormal basis"),
    Contestant("lrc-channel", f"--init channel --calibration-tokens 16384 {LRC}", "LRC from the most active channels"),
    Contestant("lrc-pca", f"{PCA} {LRC}", "LRC from the teacher's principal components"),
    Contestant("lrc-ridge", f"--init ridge --calibration-tokens 16384 {LRC}", "LRC from principal components, fitted"),
    Contestant("ordinary", f"--method ordinary {WHOLE}", "the same student from scratch, LM loss only"),
    Contestant("logits", f"--method logits {WHOLE}", "the same student from scratch, LM and KL loss"),
    Contestant("tinybert", f"--method tinybert {WHOLE}", "the same student from scratch, LM, KL and feature losses"),
    Contestant("sheared", f"--method sheared {WHOLE}", "the teacher pruned, then trained"),
    Contestant("lrc-opened", f"{PCA} {LRC} {OPENED}", "lrc-pca, its matrices trained themselves after a tenth"),
)


def _ablations() -> tuple[Contestant, ...]:
    base = f"{PCA} {LRC}"
    without = tuple(
        Contestant(
            f"without-{term}",
            f"{base} --clone-terms {' '.join(other for other in CLONE_TERMS if other != term)}",
            f"no clone loss of {term}",
        )
        for term in CLONE_TERMS
    )
    return (
        *without,
        Contestant("without-clone", f"{base} --alpha 0", "no clone loss at all"),
        Contestant("without-kl", f"{base} --kl-weight 0", "no KL loss"),
        Contestant("without-lm", f"{base} --lm-weight 0", "no LM loss"),
        Contestant("tau-1", f"{base} --kl-temperature 1", "KL temperature 1 instead of 40"),
        Contestant("tau-10", f"{base} --kl-temperature 10", "KL temperature 10 instead of 40"),
        Contestant("alpha-0.02", f"{base} --alpha 0.02", "a tenth of the clone loss"),
        Contestant("alpha-2", f"{base} --alpha 2", "ten times the clone loss"),
    )


CONTESTANTS = {one.name: one for one in (*_METHODS, *_ablations())}

GROUPS = {
    "headline": ("lrc-random", "lrc-pca", ORDINARY),
    "inits": ("lrc-random", "lrc-orthogonal", "lrc-channel", "lrc-pca", "lrc-ridge", ORDINARY),
    "methods": ("lrc-pca", ORDINARY, "logits", "tinybert", "sheared", "lrc-opened"),
    "ablations": (ABLATED, *(one.name for one in _ablations())),
}


def choose(names: Sequence[str], added: Sequence[str]) -> list[Contestant]:
    """The contestants of these names and groups, in their order, and the user's own (NAME=FLAGS) after them."""
    known = dict(CONTESTANTS)
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
            parse_config(shlex.split(one.flags))
        except ConfigError as error:
            reason = "; ".join(str(error).splitlines())
            problems.append(
                f"contestant {one.name} ({one.flags}): this installation of megatron_lrc does not take its flags: "
                f"{reason}. Leave it out of --contestants, or install a version that has them."
            )
    if problems:
        raise ConfigError("\n".join(problems))
