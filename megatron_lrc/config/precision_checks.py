"""Checks of precision: loss scaling, FP8 and the kernels that it needs.

`validation.py` calls them and raises what they find; each yields one line per error, in flag spelling. What only the
machine knows (is Transformer Engine installed, which GPU is it) is checked by `mcore/kernels.py` when a run starts, so
that a dry run works anywhere.
"""

from collections.abc import Iterator

from .config import Config, ModelShape, flag_of
from .layer_sizes import is_slimmer
from .settings import ComputeConfig

#: Flags that mean nothing without another; the other, and the value that it needs (None: any).
_ONLY_WITH: tuple[tuple[str, str, str | None], ...] = (
    ("fp8_recipe", "fp8_format", None),
    ("teacher_fp8", "fp8_format", None),
    ("first_last_layers_bf16", "fp8_format", None),
    ("fp8_amax_history_len", "fp8_recipe", "delayed"),
    ("fp8_amax_compute_algo", "fp8_recipe", "delayed"),
    ("num_layers_at_start_in_bf16", "first_last_layers_bf16", None),
    ("num_layers_at_end_in_bf16", "first_last_layers_bf16", None),
)

#: What every size of an FP8 product must be a multiple of: 16 for the GEMM (cuBLAS's alignment of FP8 rows, which
#: Transformer Engine asserts), the block of a recipe whose blocks are larger.
FP8_MULTIPLE = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}


def check_precision(config: Config) -> Iterator[str]:
    training = config.training
    if training.bf16 and training.fp16:
        yield "--bf16 and --fp16 are both given. Keep one; bf16 needs no loss scale."
    if training.loss_scale is not None and not training.fp16:
        yield f"--loss-scale {training.loss_scale} means nothing without --fp16. Leave it out."
    if training.min_loss_scale > training.initial_loss_scale:
        yield (
            f"--min-loss-scale {training.min_loss_scale} is above --initial-loss-scale {training.initial_loss_scale}, "
            "from which the search goes down."
        )
    yield from check_attention(config)
    yield from check_fp8(config)
    yield from check_userbuffers(config)


def check_attention(config: Config) -> Iterator[str]:
    backend = config.compute.attention_backend
    if backend in ("auto", "local"):
        return
    if config.compute.transformer_impl == "local":
        yield (
            f"--attention-backend {backend} is Transformer Engine's, which --transformer-impl local leaves out. Leave "
            "one of them out, or use --attention-backend local."
        )
    if config.data.reset_attention_mask:
        yield (
            f"--attention-backend {backend} cannot go with --reset-attention-mask: documents are attended to one after "
            "another, by torch's attention. Use --attention-backend local, or leave it out."
        )
    if backend in ("flash", "fused") and not (config.training.bf16 or config.training.fp16):
        yield f"--attention-backend {backend} has no kernels for fp32. Add --bf16, or leave it out."


def check_userbuffers(config: Config) -> Iterator[str]:
    """--tp-comm-overlap: what Transformer Engine's buffers for it are made for, and have been thought through for."""
    if not config.parallel.tp_comm_overlap:
        return
    if config.parallel.tensor_model_parallel_size == 1:
        yield "--tp-comm-overlap means nothing without --tensor-model-parallel-size above 1. Leave it out."
    if config.compute.transformer_impl == "local":
        yield (
            "--tp-comm-overlap is Transformer Engine's, which --transformer-impl local leaves out. Leave one of them "
            "out."
        )
    if not (config.training.bf16 or config.training.fp16):
        yield "--tp-comm-overlap needs half precision. Add --bf16, or leave it out."
    if config.compute.fp8_format is not None:
        yield (
            f"--tp-comm-overlap cannot go with --fp8-format {config.compute.fp8_format}: its buffers are made in half "
            "precision only. Leave one of them out."
        )


def check_fp8(config: Config) -> Iterator[str]:
    compute = config.compute
    for name, other, needed in _ONLY_WITH:
        value, has_other = getattr(compute, name), getattr(compute, other)
        if value != getattr(ComputeConfig(), name) and not (has_other == needed if needed else has_other):
            given = flag_of(name) if value is True else f"{flag_of(name)} {value}"
            yield f"{given} means nothing without {flag_of(other)}{f' {needed}' * bool(needed)}. Leave it out."
    if compute.fp8_format is None:
        return
    if not config.training.bf16:
        yield f"--fp8-format {compute.fp8_format} needs --bf16: FP8 products read and give bfloat16. Add --bf16."
    if compute.transformer_impl == "local":
        yield (
            f"--fp8-format {compute.fp8_format} needs Transformer Engine, which --transformer-impl local leaves out. "
            "Leave that out."
        )
    if compute.fp8_recipe == "delayed" and compute.first_last_layers_bf16:
        yield (
            "--first-last-layers-bf16 cannot go with --fp8-recipe delayed, which updates its scales for all layers at "
            "once. Leave it out, or use another recipe."
        )
    if compute.fp8_recipe == "delayed" and compute.teacher_fp8:
        yield (
            "--teacher-fp8 cannot go with --fp8-recipe delayed: its scales follow from passes with gradients, of which "
            "the frozen teacher has none. Use another recipe, such as tensorwise."
        )


def check_fp8_sizes(config: Config, base: ModelShape, student: ModelShape) -> Iterator[str]:
    """Each side of each matrix product on a rank. base: the teacher, or the model that ordinary training trains."""
    compute, parallel = config.compute, config.parallel
    if compute.fp8_format is None:
        return
    multiple, tp = FP8_MULTIPLE[compute.fp8_recipe], parallel.tensor_model_parallel_size
    at_once = config.training.micro_batch_size * config.training.seq_length
    divisor = parallel.context_parallel_size * (tp if parallel.is_sequence_parallel else 1)
    each = f" on each of {tp} TP processes" * (tp > 1)
    over = f", over {divisor}" * (divisor > 1)
    sizes = {
        "hidden features of the student (--student-hidden-size)": student.hidden_size,
        **_layer_sizes(base, each, tp),
        f"tokens of a micro-batch on a process (--micro-batch-size times --seq-length{over})": at_once // divisor,
    }
    if is_slimmer(student, base):
        sizes |= _layer_sizes(student, f" of the student{each}", tp)
    if compute.teacher_fp8:
        sizes["hidden features of the teacher"] = base.hidden_size
    wrong = [f"{size} {name}" for name, size in sizes.items() if size % multiple]
    if wrong:
        yield (
            f"--fp8-format {compute.fp8_format} with --fp8-recipe {compute.fp8_recipe} needs multiples of {multiple}; "
            f"there are {', '.join(wrong)}. Change that, or leave --fp8-format out."
        )
    yield from check_bf16_layers(config, student)


def _layer_sizes(shape: ModelShape, which: str, tp: int) -> dict[str, int]:
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    return {
        f"features of the attention heads{which}": heads * shape.head_dim // tp,
        f"features of q, k and v together{which}": (heads + 2 * groups) * shape.head_dim // tp,
        f"FFN features{which}": shape.ffn_hidden_size // tp,
    }


def check_bf16_layers(config: Config, student: ModelShape) -> Iterator[str]:
    """megatron-core counts them within one pipeline stage; the student has no more layers than the teacher."""
    compute, each = config.compute, student.num_layers // config.parallel.pipeline_model_parallel_size
    if not compute.first_last_layers_bf16:
        return
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if (count := getattr(compute, name)) > each:
            yield f"{flag_of(name)} {count} is more than the {each} layers of a pipeline stage. Use at most {each}."
