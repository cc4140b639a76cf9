"""How queries and keys are turned by their positions (RoPE, arXiv 2104.09864): what both models of a run are given.

The student has its teacher's rotation, whatever its hidden size: it acts on the features of a head.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_lrc.config import ModelShape


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """RoPE of one kind of layer.

    frequencies: float32 [c / 2], radians per position of each pair of features. The first c features of a head are
    rotated, i with i + c / 2, and the others pass unchanged. factor: multiplies cos and sin (YaRN, longrope).
    """

    frequencies: Tensor
    factor: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Rotations:
    """RoPE of a model. sliding: of layers with a sliding window; full: of the others. One object, where it is the same
    in all layers."""

    full: Rotation
    sliding: Rotation

    @property
    def differ(self) -> bool:
        return self.full is not self.sliding

    def of_layer(self, shape: ModelShape, layer: int) -> Rotation:
        """Of one of the own layers (from 0) of a model of this shape, if it has RoPE at all (`is_rotated`)."""
        return self.full if shape.window(layer) is None else self.sliding
