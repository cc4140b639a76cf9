"""Checks a machine with an NVIDIA GPU, and measures a step there: in one process, in about nine minutes.

    python tools/gpu_check.py

needs no model and no data. What it finds is written into a file as it goes on, the most informative first, and printed
as a table at the end. docs/gpu_check.md says what is checked, and how to install what it needs. The work is done by
benchmarks/gpu_check/, which is not installed: this file puts the checkout that it is in on the path.
"""

import argparse
import os
import sys
from pathlib import Path

# Before the imports, so that the package of this checkout is checked, whichever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_lrc.config import ConfigError


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="small sizes everywhere, to try this out (default: off)")
    parser.add_argument(
        "--without-te", action="store_true", help="a missing Transformer Engine is no failure (default: it is one)"
    )
    parser.add_argument("--teacher", metavar="DIR", help="what the last stage clones (default: a small random model)")
    parser.add_argument("--stages", nargs="+", default=[], metavar="NAME", help="only these (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, metavar="N", help="for all stages together (default: 9)")
    parser.add_argument("--json", default="gpu_check.json", metavar="FILE", help="to write (default: gpu_check.json)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 where a check failed or a stage ran over its time, 2 after a user's error, 130 after Ctrl-C."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Read once, by cuBLAS and torch: what --deterministic-mode needs, and what keeps memory in large pieces.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        from benchmarks.gpu_check import program

        return program.run(arguments, lambda line: print(line, flush=True))
    except (ConfigError, OSError) as error:
        print(f"gpu_check.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"gpu_check.py: interrupted; what was found is in {arguments.json}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
