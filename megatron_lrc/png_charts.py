"""Charts in PNG files that a flag of a tool names: all that matplotlib, which is optional, is used for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_lrc.config import ConfigError


def check_matplotlib(flag: str, without: str) -> None:
    """ConfigError where it is not installed. without: half a sentence on what there is without the flag."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{flag} draws with matplotlib, which is not installed. Run pip install matplotlib, or leave out "
            f"{flag}: {without}."
        ) from error


@contextmanager
def png_chart(path: str | Path, *, inches: tuple[float, float]) -> Iterator[Any]:
    """The axes of one chart, which is written when the block ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    yield figure.add_subplot()
    figure.savefig(path, format="png", dpi=120)
