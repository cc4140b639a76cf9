"""One self-contained HTML page about a run: curves, layers, throughput, restarts, configuration.

    megatron-lrc report runs/lrc [--output page.html]

The run may be under way. Only the files of its directory are read: nothing is downloaded, and the page asks
nothing of the network.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_lrc.commands.flags import new_parser
from megatron_lrc.report.run_page import write_report


def run(argv: Sequence[str], program: str) -> int:
    parser = new_parser(program, __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, as --save named it")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="page to write (default: RUN/report.html)")
    flags = parser.parse_args(argv)
    page = write_report(flags.run, flags.output)
    print(f"wrote {page} ({page.stat().st_size / 1024:.0f} KiB)")
    return 0
