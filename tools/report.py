"""One self-contained HTML page about a run, finished or under way: curves, layers, throughput, restarts, configuration.

    python tools/report.py runs/lrc [--output page.html]

Reads the files of the run directory only; nothing is downloaded, and the page asks nothing of the network.
All work is in megatron_lrc/report/.
"""

import argparse
import sys
from pathlib import Path

from megatron_lrc.config import ConfigError
from megatron_lrc.report.run_page import write_report


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, as --save named it")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="page to write (default: RUN/report.html)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after a user's error (a sentence on stderr), or 130 after Ctrl-C."""
    flags = parse_flags(argv)
    try:
        page = write_report(flags.run, flags.output)
    except (ConfigError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("report.py: interrupted", file=sys.stderr)
        return 130
    print(f"wrote {page} ({page.stat().st_size / 1024:.0f} KiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
