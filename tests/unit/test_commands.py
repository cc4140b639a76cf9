"""The commands: one table for `megatron-lrc`, `python -m megatron_lrc` and tools/, and a wheel with all."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_lrc.commands import main as commands
from megatron_lrc.commands import merge_datasets, report
from megatron_lrc.config import ConfigError

ROOT = Path(__file__).parents[2]
#: Those that run a command of the package; the others run what is beside them in the checkout.
OF_CHECKOUT = ("benchmark.py", "gpu_check.py")
TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if path.name not in OF_CHECKOUT)
#: Asks every command for --help; prints the heavy packages loaded meanwhile, and how many commands there are.
ALL_HELP = """
import contextlib, io, sys
from megatron_lrc.commands.main import MODULES, main
for command in (*MODULES, "plan layers", "plan shape"):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            code = main([*command.split(), "--help"])
        except SystemExit as end:
            code = end.code
    assert output.getvalue().startswith(f"usage: megatron-lrc {command} ") and code == 0, (command, code)
print([name for name in ("torch", "megatron.core", "transformers") if name in sys.modules], len(MODULES))
"""


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_a_tool_refuses_under_its_own_name(path):
    command = [sys.executable, path, "--no-such-flag"]
    done = subprocess.run(command, capture_output=True, text=True, env=here())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"{path.name}: ")


def test_every_command_of_the_package_but_train_and_check_has_a_tool():
    named = [path.read_text().split('run_tool("')[1].split('"')[0] for path in TOOLS]
    assert sorted([*named, "train", "check"]) == sorted(commands.MODULES)


def test_usage_lists_every_command(capsys):
    for program in ("megatron-lrc", "python -m megatron_lrc"):
        assert commands.main(["--help"], program=program) == 0
        output = capsys.readouterr().out
        assert output.startswith(f"usage: {program} COMMAND FLAGS\n")
        assert all(f"\n  {name} " in output for name in commands.MODULES)
        assert max(map(len, output.splitlines())) <= 110


def test_no_command_and_an_unknown_one_are_refused(capsys):
    unknown = "error: unknown command 'trian': use one of"
    for argv, words in (([], "error: no command is given: use one of"), (["trian"], unknown)):
        assert commands.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith(words) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (ConfigError("--a is wrong.\n--b is wrong."), 2, "P: --a is wrong.\nP: --b is wrong.\n"),
        (OSError(28, "No space left on device"), 2, "P: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "P: interrupted\n"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated memory is large"),
            2,
            "P: the memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB). Use fewer bars.\n",
        ),
    ],
)
def test_what_ends_a_command_costs_a_line_each(failure, code, said, monkeypatch, capsys):
    def run(argv: list[str], program: str) -> int:
        raise failure

    monkeypatch.setattr(report, "run", run)
    monkeypatch.setattr(report, "TAKES_LESS", "Use fewer bars.", raising=False)
    assert commands.main(["report"]) == code
    assert capsys.readouterr().err == said.replace("P", "megatron-lrc report")


def test_ctrl_c_while_a_command_is_imported_costs_a_line_too(monkeypatch, capsys):
    def import_module(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "import_module", import_module)
    assert commands.main(["train"]) == 130 and capsys.readouterr().err == "megatron-lrc train: interrupted\n"
    imported = "import sys, megatron_lrc.commands.main; print('megatron_lrc.config' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True, env=here())
    assert done.stdout == "False\n"  # nor before that


def test_after_an_interruption_it_is_said_what_is_left(monkeypatch, capsys):
    def run(argv: list[str], program: str) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_datasets, "run", run)
    assert commands.run_command("merge", [], program="merge_datasets.py") == 130
    assert capsys.readouterr().err == "merge_datasets.py: interrupted; nothing was written\n"


def test_every_command_answers_help_without_torch():
    done = subprocess.run([sys.executable, "-c", ALL_HELP], capture_output=True, text=True, env=here())
    assert done.stdout == f"[] {len(commands.MODULES)}\n", done.stderr


def test_make_alone_lists_every_target_in_a_line():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, env=here())
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    assert sorted(listed) == sorted(phony.split()[1:]), done.stdout + done.stderr
    assert all(len(line.split()) > 1 and len(line) <= 110 for line in done.stdout.splitlines())


@pytest.mark.slow
def test_a_wheel_holds_the_commands_and_runs_without_the_checkout(tmp_path):
    """Built from a copy, since setuptools leaves its own files beside the sources."""
    copy = tmp_path / "copy"
    for name in ("megatron_lrc", "benchmarks", "tools", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, str(copy)], check=True, timeout=250)
    (wheel,) = tmp_path.glob("megatron_lrc-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_lrc").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert {"megatron_lrc/report/page.css", "megatron_lrc/report/page.js"} <= set(names)
    (entry_points,) = (tmp_path / "unpacked").glob("*.dist-info/entry_points.txt")
    assert "megatron-lrc = megatron_lrc.commands.main:main" in entry_points.read_text()

    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'unpacked')!r})\n{ALL_HELP}"
    program += "import megatron_lrc; print(megatron_lrc.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    expected = [f"[] {len(commands.MODULES)}", f"{tmp_path}/unpacked/megatron_lrc/__init__.py"]
    assert done.stdout.splitlines() == expected, done.stderr


def here() -> dict[str, str]:
    """The environment of a process that is to import this checkout's package."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}
