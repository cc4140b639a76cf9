"""Run directory -> Hugging Face directory, ready for AutoModelForCausalLM.from_pretrained.

    megatron-lrc convert-to-hf --load RUN --output DIR [--save-projections]

Everything else about the student comes from the checkpoint itself.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_lrc.commands.flags import DTYPES, new_parser
from megatron_lrc.commands.next_command import after_export, say_next
from megatron_lrc.config import ConfigError

INTERRUPTED = "interrupted; nothing was written"


def read_flags(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    add = parser.add_argument
    add("--load", required=True, metavar="RUN", help="Run directory; its newest complete checkpoint is taken.")
    add("--output", required=True, type=Path, metavar="DIR", help="Hugging Face directory to write.")
    add("--save-projections", action="store_true", help="Write projections.safetensors as well.")
    add("--dtype", choices=DTYPES, help="Data type of the weights. Default: that of the training.")
    add(
        "--arch",
        choices=("auto", "native", "llama"),
        default="auto",
        help="Class of the student. native: the teacher's; llama: LlamaForCausalLM, for a Qwen2 with attention biases; "
        "auto: the teacher's, unless transformers refuses it at this width (then a class that computes the same) or "
        "servers may take its heads for hidden size / heads (a narrower Qwen2: llama).",
    )
    add("--max-shard-size", default="5GB", metavar="SIZE", help="Largest weight file, as in 5GB or 300MB.")
    add(
        "--teacher",
        metavar="DIR",
        help="Where the teacher, or the model that ordinary training started from, is now. Default: where it was.",
    )
    add("--force", action="store_true", help="Replace an earlier export in DIR, once the new one is complete.")
    add("--no-verify", action="store_true", help="Skip comparing the result's logits with the student's.")
    return parser.parse_args(argv)


def run(argv: Sequence[str], program: str) -> int:
    """Open the checkpoint and its teacher, hold them against each other, export."""
    flags = read_flags(argv, program)
    import torch  # imported here with the rest, so that --help answers at once

    from megatron_lrc.hf.safetensors_writer import parse_size
    from megatron_lrc.train.metrics import last_validation
    from megatron_lrc.verify.exporting import export_saved
    from megatron_lrc.verify.weight_streams import open_student

    max_shard_size = parse_size(flags.max_shard_size)
    student, teacher = open_student(flags.load, flags.teacher)
    if flags.save_projections and not student.is_composed:
        raise ConfigError(
            f"--save-projections: the student of {student.path} has matrices of its own, which no projection makes. "
            "Leave it out."
        )
    architecture = export_saved(
        student,
        teacher,
        output=flags.output,
        losses=last_validation(student.path.parent, student.state.step),
        dtype=getattr(torch, flags.dtype) if flags.dtype else None,
        arch=flags.arch,
        save_projections=flags.save_projections,
        max_shard_size=max_shard_size,
        force=flags.force,
        verify=not flags.no_verify,
    )
    step, hidden = student.state.step, student.shape.hidden_size
    print(f"{flags.output}: {architecture} of hidden size {hidden}, step {step}")
    say_next(program, after_export(student.config, teacher.directory, flags.output))
    return 0
