"""Which layouts of a run fit on some GPUs, and how fast each may be.

    megatron-lrc plan --gpus 64 --preset lrc-4b --global-batch-size 256
    megatron-lrc plan --gpus 8 --gpu A100-40GB --teacher DIR --student-hidden-size 1536 --train-tokens 10B

Other flags are those of `megatron-lrc train`; of the teacher only config.json is read, and for a preset of a
published run no teacher is needed. For --method lrc and logits. Layouts are searched over TP, PP, CP,
micro-batch size, recomputation and the distributed optimizer, whatever the flags say of them, over several
nodes with both --overlap flags. Memory and speed are estimates (megatron_lrc/estimate/): --mfu and the speed of
links are assumptions.

Before that comes what the student is to be, and these have a --help of their own:

    megatron-lrc plan layers --teacher DIR ...     which of the teacher's layers a student of fewer should keep
    megatron-lrc plan shape --target-params 1.2B   which shapes have so many parameters, so much memory
"""

import argparse
import json
from collections.abc import Sequence
from importlib import import_module

from megatron_lrc.commands.flags import new_parser, positive
from megatron_lrc.config import Config, ConfigError, ModelShape
from megatron_lrc.methods import method_of

#: What stands in front of the flags -> the module of this package that plans it.
SUBJECTS = {"layers": "plan_layers", "shape": "plan_shape"}


def read_flags(argv: Sequence[str], program: str) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser(program, __doc__)
    parser.add_argument("--gpus", type=positive, required=True, metavar="N", help="GPUs in all")
    parser.add_argument("--gpu", metavar="NAME", default="H100-80GB", help="their kind (default: %(default)s)")
    parser.add_argument(
        "--mfu", type=float, default=0.35, metavar="X", help="assumed share of their peak (default: %(default)s)"
    )
    parser.add_argument("--top", type=positive, default=10, metavar="N", help="layouts to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print them as JSON, with memory and time by part")
    return parser.parse_known_args(argv)


def read_run(flags: list[str]) -> tuple[Config, ModelShape]:
    """The run that the flags describe, and its teacher's shape."""
    config = read_config(flags)
    if config.model.student_hidden_size is None:
        raise ConfigError("--student-hidden-size is missing: the student's hidden size, below the teacher's.")
    return config, read_teacher(config, flags)


def read_config(flags: list[str]) -> Config:
    """The run that the flags describe; ConfigError for what is wrong in it without the teacher."""
    from megatron_lrc.config import check_layers, check_losses, check_precision, check_ranges, parse_config, raise_all

    config = parse_config(flags)
    method = method_of(config)
    raise_all([*check_ranges(config), *check_losses(method), *check_precision(config), *check_layers(config.model)])
    if not method.is_estimated:
        raise ConfigError(
            f"--method {config.model.method}: its memory and time are not estimated. Plan for lrc or logits; "
            "--dry-run N of a training estimates FLOPs and disk of ordinary and tinybert too."
        )
    return config


def read_teacher(config: Config, flags: list[str]) -> ModelShape:
    """Its shape, of config.json, or of the published run whose preset the flags name."""
    from megatron_lrc.config import PUBLISHED_RUNS, check_layers_against, presets_of, raise_all
    from megatron_lrc.estimate.published_teachers import TEACHER_SHAPES
    from megatron_lrc.hf.families import describe_teacher

    if config.model.teacher:
        teacher = describe_teacher(config.model.teacher, needs_weights=False).shape
    elif published := [name for name in presets_of(flags) if name in PUBLISHED_RUNS]:
        teacher = TEACHER_SHAPES[PUBLISHED_RUNS[published[-1]][0]]
    else:
        raise ConfigError(f"Give --teacher DIR (config.json is enough), or --preset {', '.join(PUBLISHED_RUNS)}.")
    raise_all(list(check_layers_against(config.model, teacher.num_layers)))
    return teacher


def run(argv: Sequence[str], program: str) -> int:
    if argv and argv[0] in SUBJECTS:
        subject = import_module(f"megatron_lrc.commands.{SUBJECTS[argv[0]]}")
        return subject.run(argv[1:], f"{program} {argv[0]}")
    options, flags = read_flags(argv, program)
    from megatron_lrc.config import presets_of
    from megatron_lrc.estimate.devices import GIB, gpu_named
    from megatron_lrc.estimate.plan_lines import (
        compare_with_next,
        describe_batch,
        describe_budget,
        describe_sharing,
        table,
    )
    from megatron_lrc.estimate.search import find_plans, larger_batch

    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu {options.mfu} is not a share of the GPUs' peak above 0 and at most 1.")
    config, teacher = read_run(flags)
    student, gpu = method_of(config).student_shape(teacher), gpu_named(options.gpu)
    plans = find_plans(config, teacher, student, world_size=options.gpus, gpu=gpu, mfu=options.mfu)
    shown = plans[: options.top]
    if options.json:
        print(json.dumps([plan.numbers() for plan in shown], indent=1))
        return 0
    larger = larger_batch(plans[0], teacher, student, gpu=gpu, mfu=options.mfu)
    for line in (
        f"{len(plans)} layouts fit on {options.gpus} x {gpu.name} ({gpu.memory / GIB:.1f} GiB each); the fastest:",
        *table(shown),
        f"assumed: {options.mfu:.0%} of the peak; links at 70% of theirs. Flags of the first:",
        f"  {shown[0].flags()}",
        *describe_budget(plans[0], presets_of(flags)),
        *compare_with_next(plans),
        *describe_batch(plans[0], larger),
        *describe_sharing(plans[0].config, teacher, student, world_size=options.gpus, gpu=gpu, mfu=options.mfu),
    ):
        print(line)
    return 0
