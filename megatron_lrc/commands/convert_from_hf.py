"""Hugging Face directory or GGUF file -> megatron-core distributed checkpoint, a teacher at any TP and PP.

    megatron-lrc convert-from-hf --hf-model DIR --output DIR
    megatron-lrc convert-from-hf --hf-model FILE.gguf --output DIR [--format hf]

The output has the model's config, tokenizer and generation files, and its weights in release/ under the keys
of a megatron-core GPTModel: --teacher takes it, and so does Megatron-LM's --load (with --finetune).
Everything is read back and compared bit for bit before the output gets its name.

Memory: twice the model's largest matrix and 0.3 GB, however large the model. GGUF: the whole model in
float32, and for a moment up to twice that, since transformers reads it. Disk: the output, and for GGUF as
torch_dist the same again in the meantime. One process; no torchrun.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_lrc.commands.flags import DTYPES, new_parser
from megatron_lrc.commands.next_command import after_conversion, say_next
from megatron_lrc.config import CONVERTED, ConfigError

INTERRUPTED = "interrupted; nothing was written"


def read_flags(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    add, source = parser.add_argument, "Model to convert; nothing is downloaded."
    add("--hf-model", required=True, type=Path, metavar="DIR|FILE.gguf", help=source)
    add("--output", required=True, type=Path, metavar="DIR", help="Directory to write; new, or empty.")
    stored = "Data type of the stored weights. Default: the model's own; GGUF: float32, as it is dequantised."
    add("--dtype", choices=DTYPES, help=stored)
    formats = "torch_dist: megatron-core distributed checkpoint. hf: Hugging Face directory, from GGUF only."
    add("--format", choices=("torch_dist", "hf"), default="torch_dist", help=formats)
    add("--no-verify", action="store_true", help="Skip comparing the result's logits with those of transformers.")
    return parser.parse_args(argv)


def run(argv: Sequence[str], program: str) -> int:
    """Write into a hidden folder beside the output, compare, rename."""
    flags = read_flags(argv, program)
    import torch  # imported here with the rest, so that --help answers at once

    from megatron_lrc.hf.gguf import write_gguf_as_hf
    from megatron_lrc.hf.output_folder import complete_or_absent

    source, dtype = flags.hf_model, getattr(torch, flags.dtype) if flags.dtype else None
    is_gguf = source.suffix.lower() == ".gguf" and not source.is_dir()
    if flags.format == "hf" and not is_gguf:
        raise ConfigError(
            f"--format hf writes a GGUF file as a Hugging Face directory; --hf-model {source} is no GGUF file."
        )
    with complete_or_absent(flags.output, source=source) as partial:
        if flags.format == "hf":
            counts = write_gguf_as_hf(source, partial, dtype)
        elif is_gguf:
            between = partial / "huggingface"
            write_gguf_as_hf(source, between, dtype)
            counts = write_checkpoint(between, partial, verify=not flags.no_verify)
            shutil.rmtree(between)
        else:
            counts = write_checkpoint(source, partial, dtype, verify=not flags.no_verify)
    print(f"{flags.output}: {counts[0]} tensors, {counts[1]:,} parameters, read back equal")
    say_next(program, after_conversion(flags.output))
    return 0


def write_checkpoint(source: Path, directory: Path, dtype=None, *, verify: bool) -> tuple[int, int]:
    """(tensors, parameters) written into `directory` and found equal to the source's; verify: its logits too."""
    from megatron_lrc.checkpoints.layout import all_boxes
    from megatron_lrc.hf import conversion
    from megatron_lrc.hf.checkpoint_reader import is_converted
    from megatron_lrc.hf.families import describe_teacher
    from megatron_lrc.hf.teacher import TeacherReader
    from megatron_lrc.hf.teacher_checks import CHECKPOINT_FOLDER
    from megatron_lrc.mcore.streamed_save import Piece, save_pieces
    from megatron_lrc.verify.open_models import check_conversion

    description = describe_teacher(source, role=CONVERTED)
    if is_converted(description):
        raise ConfigError(f"--hf-model {source} has been converted already: --teacher takes it as it is.")
    reader = TeacherReader(description)
    dtypes = conversion.stored_dtypes(reader, dtype)
    pieces = [
        Piece(box, dtypes[box.key], lambda box=box: conversion.fill_box(box, reader, dtypes[box.key]))
        for box in all_boxes(reader.description.shape)
    ]
    (directory / CHECKPOINT_FOLDER).mkdir()
    save_pieces(directory / CHECKPOINT_FOLDER, pieces, reader.description.shape)
    conversion.finish(directory, reader, dtypes)
    counts = conversion.compare(directory, reader)
    if verify:
        check_conversion(source, directory, dtype)
    return counts
