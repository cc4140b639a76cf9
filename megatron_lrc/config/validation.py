"""Refuses impossible configurations before any process group or model exists.

`validate()` needs only the flags and the number of processes, `validate_against_teacher()` the teacher's
shape too. What only one --method refuses is in its folder (`megatron_lrc.methods`), and is asked for here.
Each collects every error and raises one `ConfigError` with a line per error: what is wrong, with its value;
what is expected and why; what to do, in flag spelling. No torch and no communication, so that every rank
comes to the same answer. What the data holds (files, tokenizer, vocabulary) is checked where it is read.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from .budget import budgets_of, check_budget, describe_budgets
from .config import Config, ConfigError, ModelShape, flag_of, parse_clone_term
from .divergence import parse_divergence
from .layout_checks import (
    check_batches,
    check_layout,
    check_overlap,
    check_pipeline,
    check_tensor_parallel,
)
from .precision_checks import check_fp8_sizes, check_precision
from .rules import Rules
from .schedule import check_schedule
from .settings import CLONE_TERMS


def raise_all(errors: list[str]) -> None:
    if errors:
        raise ConfigError("\n".join(errors))


def validate(method: Rules, *, world_size: int = 1, presets: Sequence[str] = ()) -> None:
    """Everything that can be seen without the teacher. world_size: processes of the whole run, all nodes together.

    presets: the names given with --preset, of which messages speak.
    """
    config = method.config
    errors = list(check_ranges(config))
    if not errors:  # the rest divides by these numbers
        errors += check_layout(config, world_size)
        errors += check_batches(config, world_size, presets)
    errors += method.check()
    errors += check_budget(config.training)
    errors += check_losses(method)
    errors += check_precision(config)
    errors += check_rate(method)
    errors += check_data(config)
    errors += check_checkpoint(config)
    raise_all(errors)


def validate_against_teacher(method: Rules, teacher: ModelShape) -> list[str]:
    """What depends on the teacher's sizes. Returns warnings: allowed, but probably not what was meant."""
    config, student = method.config, method.student_shape(teacher)
    raise_all(
        [
            *check_tensor_parallel(config, teacher, has_projections=method.has_projections),
            *check_pipeline(config, method.divided_shape(teacher)),
            *check_overlap(config, student),
            *method.check_against(teacher),
            *check_top_k(config, teacher),
            *check_fp8_sizes(config, teacher, student),
        ]
    )
    return [*method.warn_against(teacher), *warn_about_positions(method, teacher)]


# ------------------------------------------------------------------------------------------------ without the teacher


def check_ranges(config: Config) -> Iterator[str]:
    """The ranges that stand beside the fields of `settings`. NaN and infinity are in no range, and neither is what
    overflows further on: in fp32, in the bytes of a tensor, in a date."""
    for section in fields(config):
        for field in fields(getattr(config, section.name)):
            value = getattr(getattr(config, section.name), field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            bounds = field.metadata
            at_least, above = bounds.get("at_least", -math.inf), bounds.get("above", -math.inf)
            below = bounds.get("below", LARGEST)
            if not (math.isfinite(value) and at_least <= value and above < value < below):
                parts = [f"{word} {bounds[key]}" for key, word in RANGE_WORDS.items() if key in bounds]
                if value >= LARGEST and "below" not in bounds:
                    parts.append(f"below {LARGEST:g}")
                yield f"{flag_of(field.name)} is {value}; it must be {' and '.join(parts) or 'finite'}."


#: No setting means anything from here on; tokens of a budget are fewer.
LARGEST = 10**15
RANGE_WORDS = {"at_least": "at least", "above": "above", "below": "below"}


def fields_of(section: type) -> frozenset[str]:
    """Names of the settings of one section of the configuration."""
    return frozenset(field.name for field in fields(section))


def flags_set(config: Config, names: Collection[str]) -> str:
    """Flags among these fields of projection, pruning, loss and layout that differ from their defaults: `a and b`."""
    return " and ".join(
        flag_of(field.name)
        for section in (config.projection, config.pruning, config.loss, config.parallel)
        for field in fields(section)
        if field.name in names and getattr(section, field.name) != getattr(type(section)(), field.name)
    )


def check_directory(flag: str, path: str) -> Iterator[str]:
    if not Path(path).is_dir():
        yield f"{flag} {path} is not a directory. Give a local Hugging Face directory; none is downloaded."
    elif not (Path(path) / "config.json").is_file():
        yield f"{flag} {path} has no config.json. Give a Hugging Face directory (config.json, *.safetensors)."


#: megatron-core's other modules are for MoE and MLA, or (layernorm) need Transformer Engine.
RECOMPUTE_MODULES = ("core_attn", "mlp")


def check_losses(method: Rules) -> Iterator[str]:
    config, loss = method.config, method.config.loss
    if not (loss.lm_weight or loss.kl_weight or (loss.alpha and method.has_layer_losses)):
        yield "--lm-weight, --kl-weight and --alpha are all 0: nothing is left to train on. Give one a weight."
    for text in loss.clone_terms:
        try:
            parse_clone_term(text)
        except ValueError as problem:
            yield (
                f"--clone-terms {text}: {problem}. Expected is {' '.join(CLONE_TERMS)}, each alone or with layers, "
                "as in gate:0-13 or up:4,8-11."
            )
    try:
        parse_divergence(loss.kl_divergence)
    except ValueError as problem:
        yield f"--kl-divergence {loss.kl_divergence}: {problem}."
    if not loss.kl_weight and (given := flags_set(config, {"kl_divergence", "kl_top_k"})):
        yield f"{given} cannot go with --kl-weight 0, which leaves the KL loss out. Leave it out too."
    unknown = [module for module in config.parallel.recompute_modules if module not in RECOMPUTE_MODULES]
    if unknown:
        yield f"--recompute-modules {' '.join(unknown)}: expected are any of {' '.join(RECOMPUTE_MODULES)}."


def check_top_k(config: Config, teacher: ModelShape) -> Iterator[str]:
    top_k = config.loss.kl_top_k
    if top_k is not None and top_k >= teacher.vocab_size:
        yield (
            f"--kl-top-k {top_k} is not below the vocabulary's {teacher.vocab_size} tokens. Leave it out to compare "
            "all of them."
        )


def check_rate(method: Rules) -> Iterator[str]:
    """The schedule, as far as it depends on no other budget than steps; and whether there is a rule for the rate."""
    config = method.config
    if config.optimizer.lr is None and not method.has_projections:
        yield (
            f"--lr auto has no rule for --method {config.model.method}: it is for clones (--method lrc). Give a number."
        )
    yield from check_schedule(config.optimizer, config.decay_iters if config.training.train_iters else None)


def check_data(config: Config) -> Iterator[str]:
    data, budget = config.data, budgets_of(config.training)
    has_data = bool(data.data_path or data.train_data_path)
    is_trained = any(value > 0 for value in budget.values())
    split = parse_split(data.split)
    if data.mask_last_label and config.training.seq_length == 1:
        yield "--mask-last-label with --seq-length 1 leaves no label. Leave one of them out."
    if data.data_path and (data.train_data_path or data.valid_data_path):
        yield (
            "--data-path goes with --split and cannot be combined with --train-data-path or --valid-data-path. "
            "Use one way or the other."
        )
    if data.valid_data_path and not has_data:
        yield "--valid-data-path without --train-data-path. Give both."
    if split is None:
        yield f"--split {data.split} is not up to three parts (train, validation, test) such as 969,30,1."
    if is_trained and not has_data:
        yield f"{describe_budgets(budget)} needs training data. Give --data-path or --train-data-path."
    elif config.calibrations and not has_data and config.checkpoint.load is None:
        yield (
            f"{config.calibrations[0]} runs the teacher over training tokens. Give --data-path or --train-data-path."
        )
    if data.data_path and split is not None and is_trained:
        if split[0] == 0:
            yield f"--split {data.split} leaves no training data. Give its first part a share."
        if config.logging.eval_iters > 0 and split[1] == 0:
            yield f"--split {data.split} leaves no validation data. Give its second part a share, or --eval-iters 0."
    elif data.train_data_path and not data.valid_data_path and config.logging.eval_iters > 0 and is_trained:
        yield "--train-data-path without --valid-data-path leaves nothing to validate on. Give it, or --eval-iters 0."
    if data.tokenizer_model is not None and not Path(data.tokenizer_model).exists():
        yield f"--tokenizer-model {data.tokenizer_model} does not exist. Leave it out to take the teacher's."


def check_checkpoint(config: Config) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.load == "auto" and checkpoint.save is None:
        yield "--load auto continues what --save holds. Give --save RUN."
    if checkpoint.load not in (None, "auto") and not Path(checkpoint.load).is_dir():
        yield f"--load {checkpoint.load} is not a directory. Give the run directory that an earlier --save wrote."
    if checkpoint.save is not None and Path(checkpoint.save).exists() and not Path(checkpoint.save).is_dir():
        yield f"--save {checkpoint.save} is a file. Give a directory, which is made if need be."
    for flag in ("save_interval", "async_save", "keep_last", "save_retain_interval"):
        if checkpoint.save is None and (value := getattr(checkpoint, flag)):
            given = f"--{flag.replace('_', '-')}" + ("" if value is True else f" {value}")
            yield f"{given} without --save writes nothing. Give --save RUN."
    if checkpoint.pretrained_checkpoint is not None and not Path(checkpoint.pretrained_checkpoint).is_dir():
        yield (
            f"--pretrained-checkpoint {checkpoint.pretrained_checkpoint} is not a directory. Give the run directory, "
            "or the checkpoint, whose weights to start from."
        )
    if checkpoint.save is None and budgets_of(config.training) == {"train_iters": 0}:
        yield "--train-iters 0 without --save does nothing. Give --train-iters N, or --save RUN to write the start."


def parse_split(text: str) -> tuple[float, float, float] | None:
    """The three parts of --split, missing ones 0; None if it is not such a list or sums to nothing."""
    try:
        parts = [float(part) for part in text.replace("/", ",").split(",")]
    except ValueError:
        return None
    if len(parts) > 3 or not all(math.isfinite(part) and part >= 0 for part in parts) or sum(parts) == 0:
        return None
    train, valid, test = parts + [0.0] * (3 - len(parts))
    return train, valid, test


# --------------------------------------------------------------------------------------------------- with the teacher


def warn_about_positions(method: Rules, teacher: ModelShape) -> Iterator[str]:
    config, seq_length = method.config, method.config.training.seq_length
    if teacher.max_position_embeddings and seq_length > teacher.max_position_embeddings:
        use = "trained for: its targets beyond them may be poor" if method.has_teacher else "made for"
        yield (
            f"--seq-length {seq_length} is above the {teacher.max_position_embeddings} positions the "
            f"{config.base_role.noun} was {use}."
        )
