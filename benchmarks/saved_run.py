"""A run directory to export from, as a program: the product's own engine, one step on random tokens, one checkpoint.

    python -m benchmarks.saved_run --teacher DIR --student-hidden-size N --save RUN

In a process of its own, so that what training takes is given back before anything is measured. One step, since Adam's
state is empty before, and an export reads all of a checkpoint to see that nothing in it has changed.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.measured_models import add_model_flags, build, config_of
from megatron_lrc.checkpoints.run_directory import RunState
from megatron_lrc.config import ConfigError
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.checkpoint_writer import CheckpointWriter, SaveFailed
from megatron_lrc.train.step import train_step


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add_model_flags(parser)
    parser.add_argument("--save", required=True, metavar="RUN", help="run directory to write")
    try:
        make(parser.parse_args(argv))
    except (ConfigError, SaveFailed, OSError) as error:
        print(f"saved_run: {error}", file=sys.stderr)
        return 2
    return 0


def make(arguments: argparse.Namespace) -> None:
    config = config_of(arguments)
    config.checkpoint.save = arguments.save
    fingerprint = open_teacher(describe_teacher(arguments.teacher)).fingerprint()
    trained, batches = build(config)
    train_step(trained, batches)
    writer = CheckpointWriter(config, trained.groups)
    state = RunState(step=1, tokens=config.training.seq_length, teacher_fingerprint=fingerprint)
    writer.start(state, trained.stages, trained.optimizer)
    writer.finish()
    writer.close()
    distributed.stop()


if __name__ == "__main__":
    sys.exit(main())
