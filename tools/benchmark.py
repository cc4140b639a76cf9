"""Measures megatron_lrc against the usual way of doing the same, on this machine, in one run.

    python tools/benchmark.py data --tokenizer-model TEACHER

prints a table whose ratios compare contestants that took turns. All work is in megatron_lrc/benchmarks/, one module per
subcommand.
"""

import argparse
import sys

from megatron_lrc.benchmarks import checkpoint, compose, data, export, head, step
from megatron_lrc.config import ConfigError

COMMANDS = {
    "data": data,
    "checkpoint": checkpoint,
    "export": export,
    "head": head,
    "compose": compose,
    "step": step,
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.add_flags(commands.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 where contestants that should agree do not, 2 after a user's error, 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    try:
        return COMMANDS[arguments.command].run(arguments, lambda line: print(line, flush=True))
    except (ConfigError, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
