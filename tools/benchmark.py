"""Measures megatron_lrc against the usual way of doing the same, on this machine, in one run.

    python tools/benchmark.py data --tokenizer-model TEACHER

prints a table whose ratios compare contestants that took turns. The work is done by the modules of
benchmarks/, one for each subcommand. They are not installed: this file puts the checkout that it is in on the
path.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

# Before the imports, so that the package of this checkout is measured, whichever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_lrc.config import ConfigError

#: Name of the subcommand, whose module is NAME_benchmark -> what is measured, against what.
COMMANDS = {
    "data": "tokenization of a corpus: MB/s, tokens/s, memory, against Megatron-LM's pattern",
    "checkpoint": "saving in the background against saving at once: what each costs the training loop",
    "export": "exporting a student to Hugging Face: time and memory, against copying the same bytes",
    "head": "LM and KL losses with their gradients: time and memory, against full logits and autograd",
    "compose": "compose and pull back, against their bare matrix products and against micro-batches",
    "start": "what it costs that 1,024 ranks compare what they are before they start (simulated)",
    "methods": "tokens/s of an optimizer step of every method, over ordinary training's",
    "kernels": "launches, bytes and FLOPs of an LRC step by part, counted without a GPU, beside their bounds",
    "generation": "tokens/s and KV cache of models that transformers generates with, as ratios to the first",
    "step": "tokens/s of whole optimizer steps: LRC, ordinary training of the student, a naive LRC",
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """With the `module` that does it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name in argv[:1]:  # the others' modules load torch and the engine for flags that nobody gave
            module = import_module(f"benchmarks.{name}_benchmark")
            module.add_flags(command)
            command.set_defaults(module=module)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 where contestants that should agree do not, 2 after a user's error, 130 after Ctrl-C."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        return vars(arguments).pop("module").run(arguments, lambda line: print(line, flush=True))
    except (ConfigError, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
