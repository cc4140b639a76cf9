"""The same as `megatron-lrc convert-to-hf`, whose --help explains it."""

from megatron_lrc.commands.main import run_tool

if __name__ == "__main__":
    run_tool("convert-to-hf", __file__)
