"""Which of its teacher's layers a student of fewer should keep, measured on training tokens.

    megatron-lrc plan layers --teacher DIR --data-path PREFIX --seq-length 2048 --calibration-tokens 16384 \\
        --student-num-layers 20 --layer-importance hidden-state loss

Prints how much each layer matters, and the --student-layers to train with. Other flags are those of `megatron-lrc
train`, of which teacher, data, --seq-length, --seed, --bf16 and --calibration-tokens count. One process reads the
teacher, a layer at a time, so what is chosen depends on no layout, and a teacher may be larger than a GPU.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence

from megatron_lrc.commands.flags import new_parser
from megatron_lrc.config import (
    Config,
    ConfigError,
    ModelConfig,
    check_layers_against,
    check_ranges,
    describe_layers,
    most_important,
    parse_config,
    raise_all,
)

TAKES_LESS = "Use fewer --calibration-tokens, --bf16, or --layer-importance hidden-state, which keeps less."
MEASURES = ("hidden-state", "loss")


def read_flags(argv: Sequence[str], program: str) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser(program, __doc__)
    parser.add_argument(
        "--layer-importance",
        nargs="+",
        choices=MEASURES,
        default=["hidden-state"],
        metavar="MEASURE",
        help="what a layer matters by. hidden-state: 1 - the cosine of its input and output, also called block "
        "influence; one forward pass. loss: how much the teacher's LM loss rises without it; as many forward passes "
        "as half the layers, and hidden states for each layer. Both may be given (default: hidden-state)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser.parse_known_args(argv)


def run(argv: Sequence[str], program: str) -> int:
    options, flags = read_flags(argv, program)
    config = parse_config(flags)
    check(config)
    importance = measure(config, list(dict.fromkeys(options.layer_importance)))
    kept = {name: most_important(figures, wanted_layers(config.model, figures)) for name, figures in importance.items()}
    if options.json:
        named = {name: {"importance": importance[name], "kept": kept[name]} for name in importance}
        print(json.dumps(named, indent=1))
        return 0
    for line in (*table(importance, kept), *choices(importance, kept)):
        print(line)
    return 0


def wanted_layers(model: ModelConfig, figures: Sequence[float]) -> int:
    return len(figures) if model.student_num_layers is None else model.student_num_layers


def check(config: Config) -> None:
    """ConfigError for what is seen without the teacher."""
    errors = [*check_ranges(config)]
    if config.model.teacher is None:
        errors.append("--teacher is missing: whose layers are measured. Give its directory.")
    if config.model.student_layers:
        given = " ".join(config.model.student_layers)
        errors.append(f"--student-layers {given} names them already. Give --student-num-layers, how many to keep.")
    if not (config.data.data_path or config.data.train_data_path):
        errors.append("--layer-importance is measured on training tokens. Give --data-path or --train-data-path.")
    raise_all(errors)


def measure(config: Config, measures: Sequence[str]) -> dict[str, list[float]]:
    """Measure -> the importance of each of the teacher's layers."""
    import torch

    from megatron_lrc.data.data_checks import check_data
    from megatron_lrc.data.datasets import first_samples
    from megatron_lrc.hf.checkpoint_reader import open_teacher
    from megatron_lrc.hf.families import describe_teacher
    from megatron_lrc.hf.rope import rotations
    from megatron_lrc.mcore.layer_importance import layer_importance
    from megatron_lrc.verify.weight_streams import stream_weights

    assert config.model.teacher is not None, "check() comes first"
    teacher = describe_teacher(config.model.teacher)
    raise_all(list(check_layers_against(config.model, teacher.shape.num_layers)))
    check_data(config, teacher.shape.vocab_size)
    batch = first_samples(config, -(-config.projection.calibration_tokens // config.training.seq_length))
    reader, found = open_teacher(teacher), {}
    for name in measures:
        weights = stream_weights(teacher.family, teacher.shape, reader.weight)
        dtype = torch.bfloat16 if config.training.bf16 else torch.float32
        rope = rotations(teacher, batch["tokens"].shape[1])
        found[name] = layer_importance(name, weights, teacher.shape, rope, batch, dtype)
    if not all(math.isfinite(figure) for figures in found.values() for figure in figures):
        raise ConfigError("The teacher's activations are not finite on these tokens. Try without --bf16.")
    return found


def table(importance: Mapping[str, Sequence[float]], kept: Mapping[str, Sequence[int]]) -> list[str]:
    """A line for each layer; what is kept has a star, where fewer than all are."""
    lines = ["layer" + "".join(f"  {name:>12} " for name in importance)]
    for layer in range(len(next(iter(importance.values())))):
        cells = []
        for name, figures in importance.items():
            is_marked = layer in kept[name] and len(kept[name]) < len(figures)
            cells.append(f"  {figures[layer]:>12.4f}{'*' if is_marked else ' '}")
        lines.append(f"{layer:>5}" + "".join(cells))
    return [line.rstrip() for line in lines]


def choices(importance: Mapping[str, Sequence[float]], kept: Mapping[str, Sequence[int]]) -> list[str]:
    """A line for each measure: the flag to train with; where no number was asked for, the order of what matters."""
    lines = []
    for name, figures in importance.items():
        if len(kept[name]) < len(figures):
            what = f"the {len(kept[name])} that matter most: --student-layers {describe_layers(kept[name])}"
        else:
            order = sorted(range(len(figures)), key=lambda layer: (figures[layer], -layer))
            what = f"the one that matters least first: {' '.join(map(str, order))}"
        lines.append(f"by {name}, {what}")
    return lines
