"""The commands: what `megatron-lrc`, `python -m megatron_lrc` and the files of tools/ run.

Each is a module with `run(argv, program) -> exit code`, where `program` is what the user called, for
messages. Many also have INTERRUPTED: what Ctrl-C leaves behind; some have TAKES_LESS: what to do where memory runs
out. All of them are importable without torch, so that --help answers at once; what needs torch is imported inside
their functions.
"""
