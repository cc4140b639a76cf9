"""What the checks are told, and the sizes of the small models that they build."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sizes:
    """Of the small model, its student, and its batch. On a GPU sizes that FP8 products can have."""

    hidden: int = 256
    student: int = 128
    heads: int = 8
    groups: int = 4
    head_dim: int = 32
    ffn: int = 512
    layers: int = 2
    vocabulary: int = 512
    sequence: int = 128
    micro_batch: int = 4
    num_microbatches: int = 2


SMALLEST = Sizes(
    hidden=64, student=32, heads=4, groups=2, head_dim=16, ffn=96, vocabulary=256, sequence=16, micro_batch=2
)


@dataclass(frozen=True)
class Settings:
    """device: `cuda` or `cpu`. is_tiny: every stage at sizes that a laptop has done in a second. needs_engine: False
    where Transformer Engine may be missing. teacher: a Hugging Face directory to train on, if one is given. seconds:
    for everything; in a stage, for that. folder: for files that are not kept."""

    device: str
    is_tiny: bool
    needs_engine: bool
    teacher: str | None
    seconds: float
    folder: Path

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def sizes(self) -> Sizes:
        return SMALLEST if self.is_tiny and not self.is_cuda else Sizes()
