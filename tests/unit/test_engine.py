"""Transformer Engine that is installed and does not work, or is too old: one sentence, before megatron-core breaks.

It is not needed for that: a package of its name breaks as its sources (2.1 to 2.20) say that it breaks.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from config_cases import change
from megatron_lrc.commands.main import main
from megatron_lrc.mcore import engine, kernels

ROOT = Path(__file__).parents[2]
#: What its own `__init__` does with the errors of its part for torch.
TOLERANT = """
try:
    from . import pytorch
except (ImportError, StopIteration):
    pass
except FileNotFoundError:
    import warnings
    warnings.warn("Detected a PyTorch installation but could not find the shared object file", RuntimeWarning)
"""
NO_EXTENSION = 'raise FileNotFoundError("Could not find shared object file for Transformer Engine torch lib.")'
OTHER_TORCH = 'raise ImportError("/x/transformer_engine_torch.cpython-311.so: undefined symbol: _ZN3c105ErrorC2E")'


def install(folder: Path, pytorch: str, *, version: str = "2.4.0", package: str = TOLERANT) -> Path:
    """A package transformer_engine in `folder`, whose part for torch runs `pytorch`."""
    for name, text in (("__init__", package), ("pytorch/__init__", pytorch)):
        file = folder / "transformer_engine" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    metadata = folder / f"transformer_engine-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n")
    return folder


@pytest.fixture
def unhidden(monkeypatch):
    """Without a GPU megatron_lrc has hidden the module."""
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    monkeypatch.setattr(engine, "_problem", None)


@pytest.mark.parametrize(
    ("pytorch", "package", "expected"),
    [
        (NO_EXTENSION, TOLERANT, "without its extension for torch (FileNotFoundError: Could not find shared"),
        ("raise StopIteration", TOLERANT, "without its extension for torch (StopIteration)"),
        ("import transformer_engine_torch", TOLERANT, "without its extension for torch (ModuleNotFoundError: No"),
        (OTHER_TORCH, TOLERANT, f"but was compiled for another torch than {torch.__version__} (ImportError: /x/"),
        ("", 'raise OSError("libnccl.so.2: cannot open")', "but cannot be imported (OSError: libnccl.so.2: cannot"),
        ("", 'raise RuntimeError("empty meta package\\nmore")', "imported (RuntimeError: empty meta package)."),
        ('assert 0, "version mismatch"', TOLERANT, "but cannot be imported (AssertionError: version mismatch)."),
    ],
)
def test_what_breaks_is_told_in_a_sentence_and_hidden_from_megatron_core(
    tmp_path, monkeypatch, unhidden, recwarn, pytorch, package, expected
):
    monkeypatch.syspath_prepend(install(tmp_path, pytorch, package=package))
    engine.hide_if_broken()
    problem = engine.broken_engine()
    assert problem and problem.startswith("Transformer Engine 2.4.0 is installed ") and expected in problem
    assert "--no-build-isolation --no-cache-dir --force-reinstall --no-deps transformer-engine-torch==2.4.0" in problem
    assert "\n" not in problem and not recwarn.list
    with pytest.raises(ImportError):
        import transformer_engine  # noqa: F401
    assert not [name for name in sys.modules if name.startswith("transformer_engine.")]


def test_what_works_or_is_not_there_is_let_alone(tmp_path, monkeypatch, unhidden):
    engine.hide_if_broken()
    assert engine.broken_engine() is None and "transformer_engine" not in sys.modules
    monkeypatch.syspath_prepend(install(tmp_path, ""))
    engine.hide_if_broken()
    assert engine.broken_engine() is None and "transformer_engine.pytorch" in sys.modules
    del sys.modules["transformer_engine"], sys.modules["transformer_engine.pytorch"]


def test_a_run_with_a_broken_one_ends_in_that_sentence_and_data_can_be_used(tiny_llama, tiny_text, tmp_path):
    """In a process that believes to have a GPU, where importing megatron-core would fail."""
    package = install(tmp_path / "site", OTHER_TORCH)
    flags = f"--teacher {tiny_llama()} --student-hidden-size 32 --data-path {tiny_text} --split 90,10,0"
    program = f"""
        import sys, torch
        torch.cuda.is_available = lambda: True
        import megatron_lrc.data.passes
        from megatron_lrc.commands.main import main
        sys.exit(main(["train", *{flags.split()!r}, "--seq-length", "16", "--train-iters", "1", "--bf16"]))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "Transformer Engine 2.4.0 is installed but was compiled for another torch" in error
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert error.endswith("With --transformer-impl local a run does without it.")


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_megatron_core_gets_what_it_imports_of_triton_without_it():
    """0.19 imports these kernels, and they import Triton, whether there is a GPU or not."""
    from megatron.core.transformer.moe.ops.paged_stash import any_of_its_kernels

    assert any_of_its_kernels is None and importlib.util.find_spec("triton") is None


# ------------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("recipe", "version", "expected"),
    [
        ("tensorwise", "2.1.0", "tensorwise needs Transformer Engine 2.2.0; 2.1.0 is installed."),
        ("tensorwise", "2.2.0.dev0+5fdd7bb", None),
        ("tensorwise", "1.13.0", "use --fp8-recipe delayed."),
        ("blockwise", "2.2.0+c55e425", "blockwise needs Transformer Engine 2.3.0; 2.2.0+c55e425 is installed."),
        ("blockwise", "2.3.0.dev0+5fdd7bb", None),
        ("blockwise", "2.10.0", None),
        ("mxfp8", "2.0.0", "mxfp8 needs Transformer Engine 2.1.0; 2.0.0 is installed."),
        ("delayed", "1.13.0", None),
    ],
)
def test_each_recipe_has_its_first_version(valid_config, monkeypatch, recipe, version, expected):
    change(valid_config, bf16=True, fp8_format="hybrid", fp8_recipe=recipe)
    monkeypatch.setattr(engine, "installed_version", lambda: Version(version))
    problem = engine.too_old_for_recipe(valid_config)
    assert problem is None if expected is None else expected in str(problem)


def test_pip_keeps_the_pre_releases_that_containers_have():
    (found,) = re.findall(r"install_requires=(\[.*?\n    \])", (ROOT / "setup.py").read_text(), re.DOTALL)
    needed = {(parsed := Requirement(text)).name: parsed.specifier for text in ast.literal_eval(found)}
    for name, taken, refused in (
        ("torch", ["2.6.0a0+ecf3bae40a.nv25.01", "2.8.0a0+5228986c39.nv25.06", "2.13.0"], ["2.5.1", "2.5.0a0+b465"]),
        ("megatron-core", ["0.16.0rc0", "0.16.1", "0.19.2"], ["0.15.3", "0.20.0rc0", "0.20.0"]),
    ):
        assert all(needed[name].contains(version, prereleases=True) for version in taken)
        assert not any(needed[name].contains(version, prereleases=True) for version in refused)
        assert not needed[name].prereleases  # pip would take pre-releases from the index then


def test_a_dry_run_warns_of_a_recipe_that_the_installed_version_lacks(
    tiny_llama, tiny_text, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(install(tmp_path, "", version="2.1.0"))
    flags = f"--teacher {tiny_llama()} --student-hidden-size 32 --data-path {tiny_text} --split 90,10,0"
    fp8 = "--seq-length 16 --train-iters 1 --bf16 --fp8-format e4m3 --dry-run"
    assert main(["train", *flags.split(), *fp8.split()]) == 0
    line = "warning: --fp8-recipe tensorwise needs Transformer Engine 2.2.0; 2.1.0 is installed."
    assert line in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "HAVE_TE", True)
    assert main(["train", *flags.split(), *fp8.split()]) == 2
    assert f"error: {line.removeprefix('warning: ')}" in capsys.readouterr().err
