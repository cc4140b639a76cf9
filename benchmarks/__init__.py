"""What tools/benchmark.py runs: contestants that alternate in one run, so that their ratios mean something.

Each subcommand NAME is a module NAME_benchmark with `add_flags(parser)` and `run(arguments, report) -> exit code`. All
of it runs from the checkout, with the package of the checkout, and is not installed.
"""
