"""Every command that a page shows has flags that its program takes, and a test that runs the program."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from command_line import ROOT
from megatron_lrc.commands.main import MODULES
from megatron_lrc.config import check_budget, parse_config
from tools_path import load_tool

TESTS = ROOT / "tests"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BEGINNING = re.compile(r"(?:[A-Z_]+=\S+ )*(python t(ools|ests)/|bash |torchrun |sbatch |make |megatron-lrc )")

#: File that a command starts -> the test that runs it with real inputs, or what it needs that no test has.
RUN_BY = {
    "tools/preprocess_data.py": "unit/test_indexing.py",
    "tools/inspect_data.py": "unit/test_inspection.py",
    "tools/merge_datasets.py": "unit/test_merging.py",
    "tools/build_index_cache.py": "unit/test_index_cache.py",
    "tools/convert_from_hf.py": "unit/test_conversion.py",
    "tools/convert_to_hf.py": "end_to_end/test_workflow.py",
    "tools/verify_model.py": "unit/test_verification_of_models.py",
    "tools/evaluate.py": "unit/test_evaluation.py",
    "tools/fetch_tasks.py": "unit/test_fetch_tasks.py",
    "tools/mask_neurons.py": "unit/test_masking.py",
    "tools/plan.py": "unit/test_plan.py",
    "tools/report.py": "unit/test_report.py",
    "tools/compare_methods.py": "end_to_end/test_compare_methods.py",
    "tools/benchmark.py": "unit/test_benchmark.py",
    "tools/gpu_check.py": "unit/test_gpu_check.py",
    "tests/chaos.py": "distributed/test_chaos.py",
    "examples/pretrain_lrc.sh": "end_to_end/test_launch.py",
    "examples/slurm_pretrain_lrc.sbatch": "end_to_end/test_slurm.py",
}
_NEEDS = ("a GPU", "a cluster")


def commands_of(page: Path) -> list[str]:
    """The commands of a page's indented blocks, without comments and what is said beside them."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    commands = [line for line in lines if _BEGINNING.match(line)]
    return [re.sub(r"\s{3,}[^-'].*$|\s+#.*$", "", re.sub(r"\s{3,}(?=-)", " ", command)) for command in commands]


COMMANDS = [(page.name, command) for page in PAGES for command in commands_of(page)]


def started(command: str) -> str:
    """The file of ours that a command starts, or the target of make."""
    words = [word for word in shlex.split(command) if re.fullmatch(r"(tools|tests|examples)/\S+\.(py|sh|sbatch)", word)]
    return words[0] if words else command


def flags_of(command: str) -> list[str]:
    """Its flags, with numbers for placeholders of numbers, and with what may be left out."""
    words = shlex.split(command.replace("[", " ").replace("]", " "))
    flags = words[words.index(started(command)) + 1 :]
    numbers = {"N": "64", "M": "2", "K": "2", "X": "1"}
    return [numbers.get(word, word) for word in flags if word not in ("FLAGS", "...")]


@pytest.mark.parametrize("file", sorted(RUN_BY))
def test_the_program_is_run_by_the_test_that_is_named(file: str) -> None:
    if RUN_BY[file] not in _NEEDS:
        assert Path(file).stem in (TESTS / RUN_BY[file]).read_text(encoding="utf-8")


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_shown_command_is_run_by_a_test(page: str, command: str) -> None:
    assert started(command) in RUN_BY or command.split()[0] == "make", f"{page} shows {command}, which no test runs"


@pytest.mark.parametrize(("page", "command"), [one for one in COMMANDS if "pretrain_lrc" in one[1]])
def test_a_shown_training_takes_its_flags(page: str, command: str) -> None:
    flags = flags_of(command)
    if "--dry-run" in flags:
        del flags[flags.index("--dry-run") :]
    named = [ROOT / "examples/configs/laptop.yaml" if flag.endswith("config.yaml") else flag for flag in flags]
    config = parse_config([str(flag) if flag != "INIT" else "pca" for flag in named])
    is_whole = not {"FLAGS", "..."} & set(command.split()) and len(flags) > 0
    assert not is_whole or not list(check_budget(config.training)), f"{page} shows {command}"


@pytest.mark.parametrize(
    ("page", "command"),
    [one for one in COMMANDS if one[1].startswith("python tools/") and "benchmark" not in one[1]],
)
def test_a_shown_tool_takes_its_flags(page: str, command: str) -> None:
    flags = flags_of(command)
    tool = (ROOT / started(command)).read_text(encoding="utf-8")
    if "def parse_arguments" in tool:
        load_tool(Path(started(command)).stem).parse_arguments(flags)
        return
    (name,) = re.findall(r'run_tool\("(.*)", __file__\)', tool)
    command_module = import_module(f"megatron_lrc.commands.{MODULES[name]}")
    if flags and flags[0] in (subjects := getattr(command_module, "SUBJECTS", {})):
        command_module = import_module(f"megatron_lrc.commands.{subjects[flags.pop(0)]}")
    read_flags = getattr(command_module, "read_flags", None)
    if flags and read_flags:  # the others have one or two, which test_names_in_prose.py looks up
        read = read_flags(flags, name)
        if name == "plan":  # the others are flags of a training
            parse_config(read[1])
