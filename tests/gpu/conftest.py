"""A short table of what the tests on a GPU measured, at their end."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

#: (what was compared, its value, what it had to be below).
_MEASURED: list[tuple[str, float, float]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-te", action="store_true", help="skip what needs Transformer Engine where it is missing")


@pytest.fixture
def needs_engine(request: pytest.FixtureRequest) -> None:
    """Without Transformer Engine a test fails, unless told otherwise: a skipped one looks much like one that passed."""
    if find_spec("transformer_engine") is None:
        missing = "the package transformer-engine is not installed; see docs/gpu_check.md, or give --without-te"
        pytest.skip(missing) if request.config.getoption("--without-te", default=False) else pytest.fail(missing)


@pytest.fixture
def measured() -> Callable[[str, float, float], None]:
    """`measured(name, value, limit)` asserts that the value is below the limit and puts it into the table."""

    def measured(name: str, value: float, limit: float) -> None:
        _MEASURED.append((name, value, limit))
        assert value <= limit, f"{name}: {value:.3g}, allowed {limit:.3g}"

    return measured


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _MEASURED:
        return
    name = torch.cuda.get_device_name()
    terminalreporter.section(f"measured on {name}")
    width = max(len(what) for what, _, _ in _MEASURED)
    for what, value, limit in _MEASURED:
        terminalreporter.write_line(f"{what:<{width}}  {value:>10.3g}  allowed {limit:.3g}")
