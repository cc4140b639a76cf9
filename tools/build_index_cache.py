"""Builds the index maps of a run's data before it starts, on any machine.

    python tools/build_index_cache.py --config run.yaml --global-batch-size 1024

takes the flags of `python -m megatron_lrc train` (those that say nothing of data are ignored; --load says where a
resumed run stands) and prints where the maps are, the samples of each dataset and the epochs. Needs neither a GPU nor
the teacher. All work is in megatron_lrc/data/index_cache.py.
"""

import sys

from megatron_lrc.config import ConfigError, parse_config

PROGRAM = (
    "python tools/build_index_cache.py [--config FILE] --data-path PREFIX --global-batch-size N [FLAGS]",
    "Build the index maps of a run's data before it starts. Takes the run's flags.",
)


def build(argv: list[str] | None) -> None:
    config = parse_config(sys.argv[1:] if argv is None else argv, PROGRAM)

    from megatron_lrc.data.index_cache import build_index_cache  # imports torch, so --help comes first

    step, consumed_samples = 0, 0
    if config.checkpoint.load:
        from megatron_lrc.checkpoints.run_directory import AUTO, checkpoints_to_load, read_state

        found = checkpoints_to_load(config.checkpoint)
        if not found and config.checkpoint.load != AUTO:
            raise ConfigError(
                f"--load {config.checkpoint.load} holds no complete checkpoint. Leave it out for a run that starts."
            )
        if found:
            state = read_state(found[0])[0]
            step, consumed_samples = state.step, state.consumed_samples
    build_index_cache(config, step=step, consumed_samples=consumed_samples, report=lambda line: print(line, flush=True))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after a user's error (a sentence each on stderr), or 130 after Ctrl-C."""
    try:
        build(argv)
    except (ConfigError, OSError) as error:
        for line in str(error).splitlines():
            print(f"build_index_cache.py: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("build_index_cache.py: interrupted; no maps were left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
