"""What tools/benchmark.py runs: contestants that alternate in one run, so that their ratios mean something.

Each subcommand is a module of its name with `add_flags(parser)` and `run(arguments, report) -> exit code`.
"""
