"""`python -m megatron_lrc COMMAND FLAGS`: the same as the installed `megatron-lrc COMMAND FLAGS`."""

import sys

from megatron_lrc.commands.main import main

if __name__ == "__main__":
    sys.exit(main(program="python -m megatron_lrc"))
