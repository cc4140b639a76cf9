"""The same as `megatron-lrc index-cache`, whose --help explains it."""

from megatron_lrc.commands.main import run_tool

if __name__ == "__main__":
    run_tool("index-cache", __file__)
