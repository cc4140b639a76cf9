"""A contestant, and its entry in the table, which has a learning rate for each kind of teacher."""

from dataclasses import dataclass

#: Kinds of teacher: the one that a comparison trains itself, and one that somebody has trained on much text.
SMALL, PRETRAINED = RATES = ("small", "pretrained")

# Peak learning rates, (small, pretrained). Small: the best of 1e-3, 3e-3 and 1e-2 for lrc-pca, lrc-random and ordinary
# on the default material (--tokens 100000 --lr-grid 1e-3 3e-3 1e-2); the others have that of the nearest of them.
# Pretrained: for a teacher like SmolLM2-135M, whose massive activations make the clone loss do harm in short runs.
RANDOM_START = ("--lr 3e-3", "--lr 3e-4")
CLOSED_FORM = ("--lr 1e-3", "--lr 2e-5 --alpha 0")
RELATIVE_RATES = ("--lr 1e-3 --alpha 0.03", "--lr 2e-5 --alpha 0.03")
OPENED_RATES = CLOSED_FORM
CUT = ("--lr 1e-3", "--lr 5e-4")  # of 1.5e-4 and 5e-4 (docs/recipes.md)
SCRATCH = ("--lr 3e-3", "--lr 1e-3")
PRUNED = ("--lr 3e-3", "--lr 1e-4")


@dataclass(frozen=True, slots=True)
class Contestant:
    """flags: what it adds to the flags of all. about: a few words for the table."""

    name: str
    flags: str
    about: str


@dataclass(frozen=True, slots=True)
class Entry:
    """rates: for each of RATES the flags that depend on the teacher. changed: flags after those."""

    name: str
    flags: str
    about: str
    rates: tuple[str, str]
    changed: str = ""

    def contestant(self, column: int) -> Contestant:
        words = (self.flags, self.rates[column], self.changed)
        return Contestant(self.name, " ".join(filter(None, words)), self.about)
