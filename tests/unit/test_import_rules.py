"""Imports go one way: config < clone < checkpoints < mcore < methods < train; hf and data know nothing of train.

Read from the syntax trees, so that an import inside a function counts too and nothing has to be installed.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_lrc"
MODULES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported_modules(path: Path, *, nodes: list[ast.stmt] | None = None) -> Iterator[str]:
    """Absolute names of what a file imports; `from a.b import c` gives a.b.c, since c may be a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(tree) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([node.module] if node.module else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_within(name: str, *roots: str) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def imports_of(*folders: str) -> list[tuple[str, str]]:
    """(importing module, imported name) for every file in these parts of the package; all of it for none."""
    names = [f"megatron_lrc.{folder}" for folder in folders] or ["megatron_lrc"]
    files = [path for path in MODULES if is_within(module_name(path), *names)]
    return [(module_name(path), imported) for path in files for imported in imported_modules(path)]


def test_the_front_end_answers_without_torch():
    allowed = {*sys.stdlib_module_names, "yaml"}
    for importer, imported in imports_of("config"):
        ours = is_within(imported, "megatron_lrc.config", "megatron_lrc.__version__")
        assert ours or imported.partition(".")[0] in allowed, (importer, imported)


def test_settings_are_imported_through_one_door():
    for importer, imported in imports_of():
        if not is_within(importer, "megatron_lrc.config"):
            inside = [f"megatron_lrc.config.{path.stem}" for path in (PACKAGE / "config").glob("*.py")]
            assert not is_within(imported, *inside), (importer, imported)


def test_clone_imports_only_torch_and_config():
    allowed = {*sys.stdlib_module_names, "torch"}
    for importer, imported in imports_of("clone"):
        ours = is_within(imported, "megatron_lrc.clone", "megatron_lrc.config")
        assert ours or imported.partition(".")[0] in allowed, (importer, imported)


def test_checkpoints_import_only_torch_and_what_is_below():
    allowed = {*sys.stdlib_module_names, "torch", "megatron_lrc.__version__"}
    for importer, imported in imports_of("checkpoints"):
        below = ("checkpoints", "clone", "config", "launch", "json_files", "plain_files")
        ours = is_within(imported, *(f"megatron_lrc.{name}" for name in below))
        assert ours or imported in allowed or imported.partition(".")[0] in allowed, (importer, imported)


def test_only_mcore_and_data_import_megatron_core():
    """data/ for its datasets (and the version that decides their cache), nothing of its models and parallelism."""
    for importer, imported in imports_of():
        if is_within(imported, "megatron", "transformer_engine", "apex"):
            names = ("megatron.core.datasets", "megatron.core.__version__")
            through_data = is_within(importer, "megatron_lrc.data") and (
                is_within(imported, *names) or imported == "megatron.core"
            )
            assert is_within(importer, "megatron_lrc.mcore") or through_data, (importer, imported)


def test_versions_are_compared_in_one_module_only():
    """A version does not say what a pre-release or a build of a container has: `2.8.0a0+...nv25.06` is not 2.8."""
    for importer, imported in imports_of():
        if is_within(imported, "packaging", "torch.torch_version") or imported.endswith("_min_version"):
            assert importer == "megatron_lrc.mcore.engine", (importer, imported)


def test_only_hf_data_and_evaluation_import_transformers():
    folders = ("hf", "data", "evaluation")
    for importer, imported in imports_of():
        if is_within(imported, "transformers"):
            within = is_within(importer, *(f"megatron_lrc.{folder}" for folder in folders))
            assert within, (importer, imported)


#: Each of these folders may import those before it, and none of those after it.
ORDER = ("config", "clone", "checkpoints", "mcore", "methods", "train")
#: What else a folder may not import: what stands above it, of the folders that are beside that order.
ABOVE = {
    "clone": ["hf", "data", "verify", "evaluation"],
    "mcore": ["verify", "estimate", "evaluation"],
    "methods": ["verify", "estimate", "evaluation"],
    "train": ["report", "evaluation", "comparison"],
    "hf": ["methods", "train", "verify", "evaluation"],
    "data": ["methods", "train", "verify", "evaluation"],
    "estimate": ["train", "verify", "data", "evaluation"],
    "verify": ["train", "evaluation"],
    "evaluation": ["train", "report", "estimate"],  # nothing but tools stands above it
    "report": ["clone", "mcore", "hf", "data", "verify", "evaluation", "comparison"],  # of train what needs no torch
    "comparison": ["clone", "mcore", "hf", "data", "verify", "estimate", "evaluation"],
}


@pytest.mark.parametrize("folder", dict.fromkeys([*ORDER, *ABOVE]))
def test_no_folder_imports_what_stands_above_it(folder):
    later = ORDER[ORDER.index(folder) + 1 :] if folder in ORDER else ()
    forbidden = [f"megatron_lrc.{name}" for name in (*later, *ABOVE.get(folder, []))]
    assert [pair for pair in imports_of(folder) if is_within(pair[1], *forbidden)] == []


def test_no_files_import_each_other_in_a_circle():
    """Imports inside functions and those for type checkers count too. CycleError names the files."""
    files = {module_name(path) for path in MODULES}

    def file_of(name: str) -> str:
        return name if name in files else file_of(name.rpartition(".")[0])

    imports = {name: set() for name in files}
    for importer, imported in imports_of():
        if is_within(imported, "megatron_lrc"):
            imports[importer].add(file_of(imported))
    TopologicalSorter(imports).prepare()


def test_a_comparison_starts_processes_and_loads_no_torch_itself():
    for importer, imported in imports_of("comparison"):
        assert not is_within(imported, "torch", "megatron", "numpy"), (importer, imported)


def test_the_harness_is_optional():
    """lm_eval is imported by name where --tasks needs it, and nowhere else."""
    assert [pair for pair in imports_of() if is_within(pair[1], "lm_eval")] == []


def test_the_package_imports_nothing_that_is_not_installed_with_it():
    assert [pair for pair in imports_of() if is_within(pair[1], "benchmarks", "tools", "tests")] == []


def test_nothing_imports_the_commands():
    """They stand above everything; `__main__.py` is the same door."""
    doors = ("megatron_lrc.commands", "megatron_lrc.__main__")
    assert [pair for pair in imports_of() if is_within(pair[1], *doors) and not is_within(pair[0], *doors)] == []


@pytest.mark.parametrize("path", [*TOOLS, *sorted((PACKAGE / "commands").glob("*.py"))], ids=lambda path: path.stem)
def test_a_command_has_no_tensor_code(path):
    """Heavy packages are imported where they are used."""
    top = list(imported_modules(path, nodes=ast.parse(path.read_text(encoding="utf-8")).body))
    assert [name for name in top if is_within(name, "torch", "megatron", "transformers", "numpy")] == []


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_a_tool_answers_help_without_loading_torch(path):
    program = (
        "import atexit, runpy, sys\n"
        "heavy = ('torch', 'megatron.core', 'transformers')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules], file=sys.stderr))\n"
        f"sys.argv = [{path.name!r}, '--help']\n"
        f"runpy.run_path({str(path)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert done.stdout.startswith(f"usage: {path.name} ")


def test_the_walker_resolves_relative_imports():
    arguments = PACKAGE / "config" / "arguments.py"
    assert "megatron_lrc.config.config.ConfigError" in dict.fromkeys(imported_modules(arguments))
    assert "megatron_lrc.train.loop" in dict.fromkeys(imported_modules(PACKAGE / "commands/train.py"))


def test_starting_on_cpu_loads_no_compiler():
    """torch.compile's parts are a third of the time of all imports, and nothing is compiled without a GPU."""
    program = (
        "import sys, megatron_lrc.verify.exporting, megatron_lrc.train.loop\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor.compile_fx') if name in sys.modules])"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
