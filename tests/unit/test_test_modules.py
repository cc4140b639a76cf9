"""Test modules stand alone: what several of them need is in a module without tests, or a fixture in a conftest."""

import ast
import warnings
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))


def imported_modules(file: Path) -> set[str]:
    """Anywhere in the file, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_nothing_imports_a_test_module():
    names = {file.stem for file in FILES if file.name.startswith(("test_", "conftest"))}
    wrong = {
        f"{file.relative_to(TESTS)} imports {module}"
        for file in FILES
        for module in imported_modules(file)
        if names & set(module.split("."))
    }
    assert len(names) > 80 and not wrong, sorted(wrong)


def test_every_module_has_a_name_of_its_own():
    """pytest imports them all as top-level modules."""
    counts = Counter(file.stem for file in FILES if file.name != "conftest.py")
    assert [name for name, count in counts.items() if count > 1] == []


def test_a_deprecation_in_our_own_calls_fails_a_test():
    """By pyproject.toml's filterwarnings, which tell the package from what it calls."""
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit("old", DeprecationWarning, "loop.py", 1, module="megatron_lrc.train.loop")
    with pytest.warns(DeprecationWarning):
        warnings.warn_explicit("old", DeprecationWarning, "other.py", 1, module="other")
