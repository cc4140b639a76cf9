"""The same as `megatron-lrc fetch-tasks`, whose --help explains it."""

from megatron_lrc.commands.main import run_tool

if __name__ == "__main__":
    run_tool("fetch-tasks", __file__)
