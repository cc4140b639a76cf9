"""Contestants trained on equal tokens and data; a table and plots of what came of it.

    megatron-lrc compare --output comparison                                       headline: LRC and ordinary
    megatron-lrc compare --output comparison --contestants ablations --seeds 1 2 3
    megatron-lrc compare --output comparison --teacher DIR --data-path PREFIX --student-hidden-size 384

Writes table.md, curves.svg, report.html and results.json to --output: held-out loss against tokens, tokens/s,
tokens to reach a loss, and how many times the tokens of LRC ordinary training needs to reach LRC's final
loss. Each run is a process of its own; run the command again to go on after an interruption. Exit code 1 if a
run failed.
"""

import argparse
import shlex
import signal
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_lrc.commands.flags import flag_adder, new_parser
from megatron_lrc.comparison.compare import Options, compare
from megatron_lrc.comparison.contestants import CONTESTANTS, GROUPS
from megatron_lrc.comparison.material import TeacherSettings
from megatron_lrc.comparison.result_tables import main_table, markdown
from megatron_lrc.comparison.run_plan import Sizes
from megatron_lrc.config import ConfigError
from megatron_lrc.console import complain, say

INTERRUPTED = "interrupted; the same command goes on from here"


def positive(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    read.__name__ = "number"
    return read


def read_flags(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(
        program,
        __doc__,
        epilog="contestants:\n"
        + "\n".join(f"  {one.name:18} {one.about:52} {one.flags}" for one in CONTESTANTS.values())
        + "\ngroups:\n"
        + "\n".join(f"  {name:18} {' '.join(names)}" for name, names in GROUPS.items()),
    )
    whole, real = positive(int), positive(float)
    add = flag_adder(parser, {whole: "N", real: "X"})
    add("--output", "folder for everything", type=Path, required=True, metavar="DIR")
    add("--contestants", "contestants and groups, see below", nargs="+", default=["headline"], metavar="NAME")
    add("--ablations", "the group `ablations` too (default: no)", action="store_true")
    own = 'one of your own, as NAME="FLAGS"; may be repeated'
    add("--add", own, action="append", default=[], metavar="NAME=FLAGS")
    common = "training flags for all contestants, before their own"
    add("--flags", common, type=shlex.split, default="", metavar="FLAGS")
    add("--seeds", "of initialisation and data order", nargs="+", type=int, default=[1], metavar="N")
    add("--tokens", "training tokens that every contestant gets", type=whole, default=200_000)
    add("--ordinary-times", "ordinary training gets up to this many times the tokens", type=real, default=10.0)
    add("--lr-grid", "learning rates to try with the first seed (default: no grid)", nargs="+", type=real, metavar="X")
    searched = "budgets up to this many times the tokens are in the grid"
    add("--lr-grid-times", searched, type=real, default=1.0, dest="grid_times")
    add("--student-hidden-size", "of every student, in features", type=whole, default=128)
    add("--seq-length", "tokens per sequence", type=whole, default=128)
    add("--global-batch-size", "sequences per step", type=whole, default=8)
    add("--validations", "held-out losses per run, beside that before the first step", type=whole, default=5)
    add("--eval-iters", "batches for each of them", type=whole, default=24)
    add(
        "--target-loss",
        "for `tokens to reach` (default: what ordinary training reaches with the tokens of all)",
        type=real,
    )
    add("--jobs", "runs at a time", type=whole, default=2)
    add("--threads", "threads (OMP_NUM_THREADS) of each", type=whole, default=1)
    add("--teacher", "Hugging Face directory (default: a small teacher is trained first)", type=Path, metavar="DIR")
    add("--data-path", "with --teacher: indexed data, as train takes it", nargs="+", metavar="PREFIX")
    add("--split", "with --data-path: shares of training, held-out and test", default="969,30,1", metavar="A,B,C")
    add("--text", "without --teacher: JSON lines with `text` (default: this environment's docstrings)", type=Path)
    made = TeacherSettings()
    for name in ("hidden_size", "num_layers", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim"):
        add(f"--teacher-{name.replace('_', '-')}", "of the trained teacher", type=whole, default=getattr(made, name))
    add("--teacher-tokens", "tokens the teacher is trained on", type=whole, default=made.tokens)
    add("--teacher-lr", "peak learning rate of that", type=real, default=made.lr)
    add("--vocab-size", "of the trained tokenizer", type=whole, default=made.vocab_size)
    add("--no-png", "do not draw curves.svg (default: draw it)", action="store_true")
    return parser.parse_args(argv)


def options_of(flags: argparse.Namespace) -> Options:
    if (flags.teacher is None) != (flags.data_path is None):
        raise ConfigError("--teacher and --data-path belong together. Give both, or neither for a small teacher.")
    if len(set(flags.seeds)) < len(flags.seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, flags.seeds))}: a seed occurs twice. Give each once.")
    values = vars(flags)
    of_teacher = {name.removeprefix("teacher_"): values[name] for name in values if name.startswith("teacher_")}
    made = TeacherSettings(
        **of_teacher, vocab_size=flags.vocab_size, seq_length=flags.seq_length, text=str(flags.text or "")
    )
    sizes = Sizes(**{one.name: values[one.name] for one in fields(Sizes)})
    data = ("--data-path", *flags.data_path, "--split", flags.split) if flags.data_path else ()
    return Options(
        output=flags.output,
        names=(*flags.contestants, *(["ablations"] if flags.ablations else [])),
        added=tuple(flags.add),
        sizes=sizes,
        seeds=tuple(flags.seeds),
        lr_grid=tuple(flags.lr_grid or ()),
        teacher=flags.teacher,
        data=data,
        made=made,
        jobs=flags.jobs,
        threads=flags.threads,
        target=flags.target_loss,
        wants_curves=not flags.no_png,
    )


def interrupt(*_: object) -> None:
    """Once: a copy of the signal would break into the stopping of the runs."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(argv: Sequence[str], program: str) -> int:
    flags = read_flags(argv, program)
    for number in (signal.SIGINT, signal.SIGTERM):  # or the runs under way would be left behind
        signal.signal(number, interrupt)
    found = compare(options_of(flags), say)
    print(f"\n{markdown(main_table(found))}\nwrote {flags.output}/table.md, results.json, report.html")
    for outcome in found.failed:
        complain(f"FAILED {outcome.run.name}: {outcome.failure}")
    return 1 if found.failed else 0
