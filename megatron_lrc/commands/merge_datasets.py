"""Joins indexed datasets of one tokenizer into one.

    megatron-lrc merge --input data/a_text_document data/b_text_document --output-prefix data/all

writes data/all.bin and .idx, and .json (a manifest) if every input has one. Documents keep their order. Where an input
says which of its tokens count in the losses (.mask, of chats), so does the result; of the others all count.
"""

from collections.abc import Sequence

from megatron_lrc.commands.flags import new_parser
from megatron_lrc.commands.next_command import after_indexing, say_next
from megatron_lrc.config import ConfigError
from megatron_lrc.console import say
from megatron_lrc.data.merging import merge_datasets
from megatron_lrc.data.writing import explain_os_error

INTERRUPTED = "interrupted; nothing was written"


def run(argv: Sequence[str], program: str) -> int:
    parser = new_parser(program, __doc__)
    inputs = "datasets in order, PREFIX of PREFIX.bin and .idx"
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help=inputs)
    outputs = "writes PREFIX.bin, .idx, .json, .mask"
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help=outputs)
    flags = parser.parse_args(argv)
    try:
        merge_datasets(flags.input, flags.output_prefix, report=say)
    except OSError as error:
        raise ConfigError(explain_os_error(error, flags.output_prefix)) from error
    say_next(program, after_indexing([flags.output_prefix]))
    return 0
