"""Shapes of a student within a budget, what each costs to serve, and how well each clones before any training.

    megatron-lrc plan shape --teacher DIR --target-params 1.2B
    megatron-lrc plan shape --preset lrc-1.5b --target-memory 3 --context-length 32768 --batch-size 8
    megatron-lrc plan shape --teacher DIR --target-decode-bytes 1.5B --layer-importance hidden-state --score \\
        --init ridge --data-path PREFIX ...

Of the shapes within all targets the largest are shown: in none could any one size take its next value. Other flags
are those of `megatron-lrc train`; a size that they give (--student-num-layers 20) is kept, and the others are
searched. Of the teacher only config.json is read, and for a preset of a published run no teacher is needed.

With --score each one is started as training would start it, and validated before its first step: by
`train --train-iters 0`, one after another, whose untrained checkpoint goes into a temporary directory (TMPDIR says
where) and is removed. --init is ridge unless another closed form is given.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrc.commands import plan_layers
from megatron_lrc.commands.flags import DTYPES, METAVARS, flag_adder, new_parser, positive
from megatron_lrc.commands.untrained_scores import flags_of_scores, score
from megatron_lrc.config import Config, ConfigError, describe_layers, flag_of, given_values, most_important, parse_count
from megatron_lrc.console import say

if TYPE_CHECKING:
    from megatron_lrc.estimate.shapes import Target

#: Flag of a target -> what of a shape's cost it limits, and how much of that one of its units is.
TARGETS = {
    "target_params": ("parameters", 1),
    "target_memory": ("memory_bytes", 1 << 30),
    "target_decode_bytes": ("decode_bytes", 1),
}
KEPT = (
    "which of the teacher's layers a student of fewer keeps: those that matter most by this, as plan layers measures it"
)
#: Bytes of a number of each type.
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


def read_flags(argv: Sequence[str], program: str) -> tuple[argparse.Namespace, list[str]]:
    parser, metavars = new_parser(program, __doc__), {**METAVARS, positive: "N"}
    add = flag_adder(parser.add_argument_group("targets, of which at least one is needed"))
    add("--target-params", "parameters of the student, at most: 1.2B, 500M", metavar="N")
    add("--target-memory", "GiB of its weights and KV cache, at most, for --batch-size sequences", type=float)
    add("--target-decode-bytes", "bytes read from memory per decoded token, at most: 1.5B is 1.5 GB", metavar="N")
    add = flag_adder(parser.add_argument_group("how the student will be used"), metavars)
    add("--context-length", "tokens of a sequence, all in the KV cache", type=positive, default=4096)
    add("--batch-size", "sequences decoded together", type=positive, default=1)
    add("--dtype", "of weights and KV cache", choices=DTYPES, default="bfloat16")
    add = flag_adder(parser.add_argument_group("the search"), metavars)
    add(
        "--hidden-size-divisor",
        "hidden sizes and FFN widths that are looked at are its multiples",
        type=positive,
        default=64,
    )
    add("--top", "shapes to show, those whose most cut size is cut least", type=positive, default=10)
    add("--layer-importance", f"{KEPT} (default: evenly spread)", choices=plan_layers.MEASURES)
    add("--score", "validate each before its first step", action="store_true")
    add("--score-processes", "processes of each validation, as torchrun starts them", type=positive, default=1)
    add = flag_adder(parser.add_argument_group("output"))
    add("--json", "print everything as JSON", action="store_true")
    add("--csv", "write the table there too", type=Path, metavar="FILE.csv")
    add("--plot", "draw it there", type=Path, metavar="FILE.png")
    return parser.parse_known_args(argv)


def run(argv: Sequence[str], program: str) -> int:
    options, flags = read_flags(argv, program)
    from megatron_lrc.commands.plan import read_config, read_teacher
    from megatron_lrc.estimate.shape_lines import draw, table, write_csv
    from megatron_lrc.estimate.shapes import AXES, Serving, find_shapes, numbers_of
    from megatron_lrc.png_charts import check_matplotlib

    targets = read_targets(options)
    if options.plot:
        check_matplotlib("--plot", "the shapes are printed as a table in any case")
    config = read_config(flags)
    if options.layer_importance:
        plan_layers.check(config)
    if options.score:
        flags = flags_of_scores(config, flags)
        config = read_config(flags)
    teacher = read_teacher(config, flags)
    given = given_values(flags)
    for axis in AXES:  # a preset's size is no wish of the user's
        if axis.setting not in given:
            setattr(config.model, axis.setting, None)
    serving = Serving(options.context_length, options.batch_size, WIDTHS[options.dtype])
    found = find_shapes(config, teacher, targets, serving, divisor=options.hidden_size_divisor, top=options.top)
    rows = [candidate.numbers() for candidate in found]
    if options.layer_importance:
        name_layers(rows, config, options.layer_importance)
    if options.score:
        add_scores(rows, flags, options.score_processes)
    if options.csv:
        write_csv(options.csv, rows)
    if options.plot:
        draw(options.plot, rows)
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    for line in table(numbers_of(teacher, serving), rows):
        print(line)
    if options.score:
        best = min(rows, key=lambda row: row["lm_loss"])
        print(f"the lowest LM loss before training: {best['flags']}")
    return 0


def name_layers(rows: Sequence[dict[str, Any]], config: Config, measure: str) -> None:
    """Have each shape's flags name the layers that matter most."""
    importance = plan_layers.measure(config, [measure])[measure]
    for row in rows:
        layers = most_important(importance, row["num_layers"])
        row["flags"] = f"{row['flags']} --student-layers {describe_layers(layers)}".strip()


def add_scores(rows: Sequence[dict[str, Any]], flags: Sequence[str], processes: int) -> None:
    """One after another, each told as it comes."""
    for number, row in enumerate(rows, 1):
        row.update(score([*flags, *row["flags"].split()], processes))
        say(f"[{number}/{len(rows)}] {row['flags']}: untrained LM loss {row['lm_loss']:.4f}", sys.stderr)


def read_targets(options: argparse.Namespace) -> list[Target]:
    """ConfigError for none, or one that is no number above 0."""
    from megatron_lrc.estimate.shapes import Target

    targets = []
    for name, (measure, scale) in TARGETS.items():
        if (given := getattr(options, name)) is None:
            continue
        most = parse_count(given) if isinstance(given, str) else given
        if most is None or not 0 < most < float("inf"):
            raise ConfigError(f"{flag_of(name)} {given} is no number above 0. Expected is one such as 1.2B or 500M.")
        targets.append(Target(f"{flag_of(name)} {given}", measure, most * scale))
    if not targets:
        raise ConfigError(f"Give a target: {', '.join(map(flag_of, TARGETS))}, or several of them.")
    return targets
