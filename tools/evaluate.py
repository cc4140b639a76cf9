"""The same as `megatron-lrc evaluate`, whose --help explains it."""

from megatron_lrc.commands.main import run_tool

if __name__ == "__main__":
    run_tool("evaluate", __file__)
