"""The same as `megatron-lrc mask-neurons`, whose --help explains it."""

from megatron_lrc.commands.main import run_tool

if __name__ == "__main__":
    run_tool("mask-neurons", __file__)
