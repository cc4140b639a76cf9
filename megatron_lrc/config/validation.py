"""Refuses impossible configurations before any process group or model exists.

`validate()` needs only the Config and the number of processes, `validate_against_teacher()` the teacher's shape too.
Each collects every error and raises one `ConfigError` with a line per error: what is wrong, with its value; what is
expected and why; what to do, in flag spelling. No torch and no communication, so that every rank comes to the same
answer. What the data holds (files, tokenizer, vocabulary) is checked where it is read.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path

from .config import Config, ConfigError, ModelShape, flag_of, parse_clone_term
from .layout_checks import (
    check_batches,
    check_layout,
    check_overlap,
    check_pipeline,
    check_pruned_shape,
    check_tensor_parallel,
)
from .precision_checks import check_fp8_sizes, check_precision
from .settings import CLONE_TERMS, LossConfig, ProjectionConfig, PruningConfig


def raise_all(errors: list[str]) -> None:
    if errors:
        raise ConfigError("\n".join(errors))


def validate(config: Config, *, world_size: int = 1) -> None:
    """Everything that can be seen without the teacher. world_size: processes of the whole run, all nodes together."""
    errors = list(check_ranges(config))
    if not errors:  # the rest divides by these numbers
        errors += check_layout(config, world_size)
        errors += check_batches(config, world_size)
    errors += check_model(config)
    errors += check_losses(config)
    errors += check_precision(config)
    errors += check_schedule(config)
    errors += check_data(config)
    errors += check_checkpoint(config)
    raise_all(errors)


def validate_against_teacher(config: Config, teacher: ModelShape) -> list[str]:
    """What depends on the teacher's sizes. Returns warnings: allowed, but probably not what was meant."""
    raise_all(
        [
            *check_tensor_parallel(config, teacher),
            *check_pipeline(config, teacher),
            *check_overlap(config, teacher),
            *check_student(config, teacher),
            *check_clone_layers(config, teacher),
            *check_fp8_sizes(config, teacher),
        ]
    )
    return list(warn_about_sizes(config, teacher))


# ------------------------------------------------------------------------------------------------ without the teacher


def check_ranges(config: Config) -> Iterator[str]:
    """The ranges that stand beside the fields in config.py. NaN and infinity are in no range."""
    for section in fields(config):
        for field in fields(getattr(config, section.name)):
            value = getattr(getattr(config, section.name), field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            bounds = field.metadata
            at_least, above = bounds.get("at_least", -math.inf), bounds.get("above", -math.inf)
            below = bounds.get("below", math.inf)
            if not (math.isfinite(value) and at_least <= value and above < value < below):
                parts = [f"{word} {bounds[key]}" for key, word in RANGE_WORDS.items() if key in bounds]
                yield f"{flag_of(field.name)} is {value}; it must be {' and '.join(parts) or 'finite'}."


RANGE_WORDS = {"at_least": "at least", "above": "above", "below": "below"}


def check_model(config: Config) -> Iterator[str]:
    if config.is_sheared:
        yield from check_sheared(config)
        return
    if given := flags_set(config, {field.name for field in fields(PruningConfig)}):
        yield f"{given} cannot go with --method {config.model.method}, which prunes nothing. Leave it out."
    if not config.has_teacher:
        yield from check_ordinary(config)
        return
    if config.model.student is not None:
        yield (
            f"--student {config.model.student} is the model that --method ordinary trains. Add that, or give --teacher "
            "and --student-hidden-size for a clone."
        )
    teacher = config.model.teacher
    if teacher is None:
        yield "--teacher is missing: the Hugging Face directory of the model to clone."
    else:
        yield from check_directory("--teacher", teacher)
    if config.model.student_hidden_size is None:
        yield "--student-hidden-size is missing: the student's hidden size, below the teacher's."
    if not config.is_clone:
        if given := flags_set(config, CLONE_ONLY - ({"alpha"} if config.is_tinybert else set())):
            yield f"{given} cannot go with --method {config.model.method}, which has no projections. Leave it out."
        if config.is_tinybert:
            yield from check_tinybert(config)
        return
    yield from check_opening(config)
    projection = config.projection
    if projection.is_closed_form and config.model.untie_embeddings_and_output_weights is False:
        yield (
            f"--no-untie-embeddings-and-output-weights cannot go with --init {projection.init}, whose closed form "
            "needs a projection for the embedding and another for the LM head. Leave it out, or use --init random."
        )
    if not projection.is_calibrated and projection.calibration_tokens != type(projection)().calibration_tokens:
        yield (
            f"--calibration-tokens {projection.calibration_tokens} means nothing with --init {projection.init}, which "
            "reads no tokens. Leave it out, or use --init channel, pca or ridge."
        )


#: What means something only for projections and the clone loss.
CLONE_ONLY = {*(field.name for field in fields(ProjectionConfig))} - {"init_method_std"} | {
    *("alpha", "clone_terms", "clone_attention_output", "detach_clone_targets")
}
#: What means something only where there is a teacher, but its model flags.
TEACHER_ONLY = CLONE_ONLY | {field.name for field in fields(LossConfig)} - {"loss_chunk_tokens"}


def flags_set(config: Config, names: Collection[str]) -> str:
    """Flags among these fields of projection, pruning and loss that differ from their defaults, joined by `and`."""
    return " and ".join(
        flag_of(field.name)
        for section in (config.projection, config.pruning, config.loss)
        for field in fields(section)
        if field.name in names and getattr(section, field.name) != getattr(type(section)(), field.name)
    )


def check_tinybert(config: Config) -> Iterator[str]:
    """What its losses on whole layers and on attention scores cannot go with."""
    parallel = config.parallel
    given = [
        flag
        for flag, is_given in (
            ("--context-parallel-size", parallel.context_parallel_size > 1),
            ("--recompute-granularity", parallel.recompute_granularity is not None),
            ("--reset-attention-mask", config.data.reset_attention_mask),
        )
        if is_given
    ]
    if given:
        yield (
            f"{' and '.join(given)} cannot go with --method tinybert, which compares whole layers and the attention "
            "scores of whole sequences. Leave it out."
        )


def check_opening(config: Config) -> Iterator[str]:
    after = config.projection.open_after
    if after is None:
        if given := flags_set(config, {"open_matrices", "open_lr"}):
            yield f"{given} needs --open-after, which says when. Set that too, or leave it out."
    elif after >= 1 and after != int(after):
        yield f"--open-after {after:g} is no number of steps. Give a whole one, or a fraction below 1."


def check_ordinary(config: Config) -> Iterator[str]:
    """--method ordinary: a model to start from, or the shape of a new one; and nothing that needs a teacher."""
    model = config.model
    if model.student is not None:
        shape = ("teacher", "student_hidden_size", "untie_embeddings_and_output_weights")
        given = [flag_of(name) for name in shape if getattr(model, name) is not None]
        if given:
            yield (
                f"--student {model.student} is the model to train, in its own shape: {' and '.join(given)} cannot go "
                "with it. Keep one."
            )
        yield from check_directory("--student", model.student)
    elif model.teacher is None or model.student_hidden_size is None:
        yield (
            "--method ordinary needs a model: --student DIR to go on from its weights, or --teacher DIR (its "
            "config.json) and --student-hidden-size N to start anew."
        )
    else:
        yield from check_directory("--teacher", model.teacher)
    if given := flags_set(config, TEACHER_ONLY):
        yield f"{given} cannot go with --method ordinary, which has no teacher. Leave it out."


def check_sheared(config: Config) -> Iterator[str]:
    """--method sheared: a model to prune, what it is pruned to, and nothing that needs a teacher beside a student."""
    model, after = config.model, config.pruning.prune_after
    if model.student is not None:
        yield f"--student {model.student}: the model that --method sheared prunes is --teacher. Give it there."
    if model.teacher is None:
        yield "--teacher is missing: the Hugging Face directory of the model to prune."
    else:
        yield from check_directory("--teacher", model.teacher)
    if model.student_hidden_size is None:
        yield "--student-hidden-size is missing: the hidden size to prune to; the teacher's leaves it as it is."
    if model.untie_embeddings_and_output_weights is not None:
        yield (
            "--untie-embeddings-and-output-weights cannot go with --method sheared: the pruned model is tied if "
            "--teacher is. Leave it out."
        )
    if given := flags_set(config, TEACHER_ONLY):
        yield f"{given} cannot go with --method sheared, which has no teacher beside it. Leave it out."
    if after >= 1 and after != int(after):
        yield f"--prune-after {after:g} is no number of steps. Give a whole one, or a fraction below 1."
    if config.checkpoint.pretrained_checkpoint is not None:
        yield "--pretrained-checkpoint cannot go with --method sheared, which starts from --teacher. Leave it out."
    if config.compute.fp8_format is not None:
        yield "--fp8-format cannot go with --method sheared: its scales are those of the uncut model. Leave it out."


def check_directory(flag: str, path: str) -> Iterator[str]:
    if not Path(path).is_dir():
        yield f"{flag} {path} is not a directory. Give a local Hugging Face directory; none is downloaded."
    elif not (Path(path) / "config.json").is_file():
        yield f"{flag} {path} has no config.json. Give a Hugging Face directory (config.json, *.safetensors)."


#: megatron-core's other modules are for MoE and MLA, or (layernorm) need Transformer Engine.
RECOMPUTE_MODULES = ("core_attn", "mlp")


def check_losses(config: Config) -> Iterator[str]:
    loss = config.loss
    if not (loss.lm_weight or loss.kl_weight or (loss.alpha and config.model.method in ("lrc", "tinybert"))):
        yield "--lm-weight, --kl-weight and --alpha are all 0: nothing is left to train on. Give one a weight."
    for text in loss.clone_terms:
        try:
            parse_clone_term(text)
        except ValueError as problem:
            yield (
                f"--clone-terms {text}: {problem}. Expected is {' '.join(CLONE_TERMS)}, each alone or with layers, "
                "as in gate:0-13 or up:4,8-11."
            )
    unknown = [module for module in config.parallel.recompute_modules if module not in RECOMPUTE_MODULES]
    if unknown:
        yield f"--recompute-modules {' '.join(unknown)}: expected are any of {' '.join(RECOMPUTE_MODULES)}."


def check_schedule(config: Config) -> Iterator[str]:
    """With --train-epochs what depends on the number of steps is seen only once they have been counted."""
    optimizer, train_iters = config.optimizer, config.training.train_iters
    if optimizer.lr_warmup_iters is not None and optimizer.lr_warmup_fraction is not None:
        yield "--lr-warmup-iters and --lr-warmup-fraction are both given. Keep one."
    elif optimizer.lr_warmup_iters and train_iters > 0 and optimizer.lr_warmup_iters >= config.decay_iters:
        yield (
            f"--lr-warmup-iters {optimizer.lr_warmup_iters} leaves nothing of the {config.decay_iters} decay steps. "
            "Warmup counts as part of them: use fewer, or a larger --lr-decay-iters."
        )
    if optimizer.min_lr > optimizer.lr >= 0:
        yield f"--min-lr {optimizer.min_lr} is above the peak --lr {optimizer.lr}. It is where the decay ends."


def check_data(config: Config) -> Iterator[str]:
    data, train_iters, train_epochs = config.data, config.training.train_iters, config.training.train_epochs
    has_data = bool(data.data_path or data.train_data_path)
    is_trained = train_iters > 0 or train_epochs > 0
    split = parse_split(data.split)
    if train_iters > 0 and train_epochs > 0:
        yield f"--train-iters {train_iters} and --train-epochs {train_epochs} are both given. Keep one, the other is 0."
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
        given = f"--train-iters {train_iters}" if train_iters > 0 else f"--train-epochs {train_epochs}"
        yield f"{given} needs training data. Give --data-path or --train-data-path."
    elif config.projection.is_calibrated and not has_data and config.checkpoint.load is None:
        yield (
            f"--init {config.projection.init} runs the teacher over training tokens. Give --data-path or "
            "--train-data-path."
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
    if checkpoint.save is None and config.training.train_iters == config.training.train_epochs == 0:
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


def check_student(config: Config, teacher: ModelShape) -> Iterator[str]:
    student_hidden_size = config.model.student_hidden_size
    if config.is_sheared:
        yield from check_pruned_shape(config, teacher)
    if not config.has_teacher:
        return
    assert student_hidden_size is not None, "validate() comes first"
    if config.projection.is_closed_form and student_hidden_size > teacher.hidden_size:
        yield (
            f"--student-hidden-size {student_hidden_size} is above the teacher's {teacher.hidden_size}: --init "
            f"{config.projection.init} takes that many orthogonal directions out of {teacher.hidden_size}. Use at most "
            f"{teacher.hidden_size}."
        )
    if config.is_clone and config.is_student_tied(teacher) and not teacher.is_tied:
        yield (
            "--no-untie-embeddings-and-output-weights cannot tie the student: the teacher's embedding and LM head are "
            "two matrices, so what one projection makes of them differs. Leave it out."
        )


def check_clone_layers(config: Config, teacher: ModelShape) -> Iterator[str]:
    for text in config.loss.clone_terms:
        _, ranges = parse_clone_term(text)
        if any(layers[-1] >= teacher.num_layers for layers in ranges or []):
            yield (
                f"--clone-terms {text} names a layer that the teacher does not have: its {teacher.num_layers} layers "
                f"are 0-{teacher.num_layers - 1}."
            )


def warn_about_sizes(config: Config, teacher: ModelShape) -> Iterator[str]:
    student_hidden_size, seq_length = config.model.student_hidden_size, config.training.seq_length
    is_wide = student_hidden_size is not None and student_hidden_size >= teacher.hidden_size
    cut, steps = config.prune_step, config.training.train_iters
    if cut is not None and 0 < steps <= cut:
        yield f"--prune-after {cut} is not before --train-iters {steps}: this run ends before its model is cut."
    if config.is_clone and config.projection.init == "random" and is_wide:
        yield (
            f"--student-hidden-size {student_hidden_size} is not below the teacher's {teacher.hidden_size}: "
            "the student will not be smaller."
        )
    if teacher.max_position_embeddings and seq_length > teacher.max_position_embeddings:
        use = "trained for: its targets beyond them may be poor" if config.has_teacher else "made for"
        yield (
            f"--seq-length {seq_length} is above the {teacher.max_position_embeddings} positions the "
            f"{config.base_role.noun} was {use}."
        )
