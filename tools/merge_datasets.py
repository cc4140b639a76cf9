"""The same as `megatron-lrc merge`, whose --help explains it."""

from megatron_lrc.commands.main import run_tool

if __name__ == "__main__":
    run_tool("merge", __file__)
