"""The tools' main functions, imported by path: tools/ is a folder of scripts, no package."""

import importlib.util
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[1] / "tools"


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


convert_to_hf = load_tool("convert_to_hf").main
convert_from_hf = load_tool("convert_from_hf").main
