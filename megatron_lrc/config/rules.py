"""What the checks of flags ask of the method that --method names."""

from collections.abc import Iterator
from typing import Protocol

from .config import Config, ModelShape


class Rules(Protocol):
    """The part of `megatron_lrc.methods.method.Method` that validation needs; this package stands below that one."""

    config: Config
    has_teacher: bool
    has_layer_losses: bool
    has_projections: bool

    def student_shape(self, base: ModelShape) -> ModelShape: ...

    def divided_shape(self, base: ModelShape) -> ModelShape: ...

    def check(self) -> Iterator[str]: ...

    def check_against(self, base: ModelShape) -> Iterator[str]: ...

    def warn_against(self, base: ModelShape) -> Iterator[str]: ...
