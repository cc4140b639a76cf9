"""The tools' main functions, as their files call them."""

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

from megatron_lrc.commands.main import run_command

TOOLS = Path(__file__).parents[1] / "tools"


def load_tool(name: str) -> ModuleType:
    """A tool with a main function of its own, imported by path: tools/ is a folder of scripts, no package."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool_main(name: str) -> Callable[[list[str]], int]:
    """The main function of a tool that is a command of the package, with the name that the file gives it."""
    (command,) = re.findall(r'run_tool\("(.*)", __file__\)', (TOOLS / f"{name}.py").read_text())
    return partial(run_command, command, program=f"{name}.py")


convert_to_hf = tool_main("convert_to_hf")
convert_from_hf = tool_main("convert_from_hf")
