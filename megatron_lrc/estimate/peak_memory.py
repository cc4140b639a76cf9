"""Peak memory of one process, by part: what is always there, and what the fullest moment of a step adds.

A step has four moments that may be the fullest, and the estimate is the largest: the end of a forward pass on the last
stage, with the logits of a chunk of tokens; the start of its backward pass, with a clone loss's gradients; the pull
back; the optimizer step. Everything is counted from shapes; what cannot be (the process without a model) is `runtime`,
measured on CPU and a stated constant on CUDA.

Notation: D teacher hidden, d student hidden, v this rank's part of the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from megatron_lrc.clone.products import ROWS_AT_ONCE
from megatron_lrc.clone.sites import EMBED, LAYER_SITES, Site
from megatron_lrc.config import Config, ModelShape
from megatron_lrc.estimate.activations import FP32, bytes_per_element, micro_batches_in_flight, stage_bytes
from megatron_lrc.estimate.stage import Stage, stages_of

#: What a process takes on a GPU without any tensor: CUDA's context, kernels, workspaces of cuBLAS, buffers of NCCL.
#: Assumed, from what these libraries document for a few communicators; not measured.
CUDA_RUNTIME = 3 * 2**30
#: Part of the memory that comes and goes which the caching allocator holds and cannot use. Assumed, not measured.
CUDA_FRAGMENTATION = 0.08

#: What a CPU's malloc, which keeps all that is freed (`mcore/cpu.py`), cannot use of it: holes between what is in use.
#: Measured with models of 0.1 billion parameters.
CPU_ALLOCATOR = 128 * 2**20

#: Tensors of the size of a chunk's logits, fp32, that a CPU has beside both models' logits where it works on all of a
#: chunk's tokens at once, under tensor parallelism: exponentials, and differences of them and of logits.
_LOGITS_BESIDE = 4


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Bytes on one process at the fullest moment of a step.

    teacher, student: with FP8 the quantised weights too. projections: P and the norm gains. projection_gradients: the
    gradient buffer, and what gathers the gradient of the clone loss's targets. optimizer: Adam's moments and, for
    16-bit parameters, the parameters in fp32. activations: of all micro-batches in flight. temporaries: what the moment
    needs besides. runtime: the rest.
    """

    teacher: float
    student: float
    student_gradients: float
    projections: float
    projection_gradients: float
    optimizer: float
    activations: float
    temporaries: float
    runtime: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def peak_memory(
    config: Config, teacher: ModelShape, student: ModelShape, *, world_size: int, runtime: float | None = None
) -> list[MemoryParts]:
    """The peak of each pipeline rank; the ranks that share a stage have the same.

    config: resolved. runtime: bytes that the process takes without a model, on a CPU; without it a GPU is meant.
    """
    return [
        max(_moments(stage, world_size, runtime), key=lambda moment: moment.total)
        for stage in stages_of(config, teacher, student)
    ]


def _moments(stage: Stage, world_size: int, runtime: float | None) -> Iterator[MemoryParts]:
    """The moments of a step, each with what is there."""
    config, on_cuda = stage.config, runtime is None
    at_rest = _at_rest(stage, world_size, CUDA_RUNTIME if runtime is None else runtime + CPU_ALLOCATOR)
    num_microbatches = config.num_microbatches(world_size)
    tokens = config.training.micro_batch_size * config.training.seq_length // config.parallel.context_parallel_size
    per_token = stage_bytes(stage, on_cuda=on_cuda)
    others = max(micro_batches_in_flight(stage, num_microbatches) - 1, 0) * per_token.kept
    head = _head_gradient(stage, tokens) if stage.is_last else 0.0

    def moment(tokens_bytes: float, temporaries: float, *, student_gradients: bool = True) -> MemoryParts:
        spare = CUDA_FRAGMENTATION * (tokens * tokens_bytes + temporaries) if on_cuda else 0.0
        return replace(
            at_rest,
            activations=tokens * tokens_bytes,
            temporaries=temporaries,
            student_gradients=at_rest.student_gradients if student_gradients else 0.0,
            runtime=at_rest.runtime + spare,
        )

    # In fp32 autograd makes the student's gradients in the first backward pass.
    is_first_and_only = num_microbatches == 1 and bytes_per_element(config) == FP32
    logits = _logits(stage, tokens, on_cuda=on_cuda) if stage.is_last else 0.0
    yield moment(others + per_token.forward, head + logits, student_gradients=not is_first_and_only)
    yield moment(others + per_token.kept, head + tokens * per_token.backward, student_gradients=not is_first_and_only)
    yield moment(0.0, _pull_back(stage, on_cuda=on_cuda))
    yield moment(0.0, _optimizer_step(stage, at_rest, on_cuda))


def _at_rest(stage: Stage, world_size: int, runtime: float) -> MemoryParts:
    config, e = stage.config, bytes_per_element(stage.config)
    trained = stage.trained_elements
    through = stage.projection_elements + stage.fixed_elements + stage.gain_elements(stage.student)
    targets = (len(stage.targets) + stage.looks_up) * stage.projection_size
    of_clone_loss = 0 if config.loss.detach_clone_targets else sum(name not in stage.own for name in stage.targets)
    with_gradient = (of_clone_loss + stage.looks_up) * stage.projection_size
    state = trained * FP32 * (2 if e == FP32 else 3)
    if config.parallel.use_distributed_optimizer:
        state /= config.data_parallel_size(world_size) * config.parallel.context_parallel_size
    fp8_of_teacher, fp8_of_student = (_fp8_weights(stage, shape) for shape in (stage.teacher, stage.student))
    return MemoryParts(
        teacher=stage.weight_elements(stage.teacher) * e + config.compute.teacher_fp8 * fp8_of_teacher,
        student=(stage.weight_elements(stage.student) - stage.absent_elements) * e + 2 * fp8_of_student,
        student_gradients=stage.composed_elements * FP32,
        # With tensor parallelism the gathered P of the targets are kept.
        projections=through * e + (targets * e if stage.tp > 1 else 0),
        projection_gradients=(trained + with_gradient) * FP32,
        optimizer=state,
        activations=0.0,
        temporaries=0.0,
        runtime=runtime,
    )


def _fp8_weights(stage: Stage, shape: ModelShape) -> int:
    """Of a model's layers, a byte each. The student's are there twice, the other time transposed, for its backward pass
    (which from compute capability 10.0 on needs none, with some recipes)."""
    if stage.config.compute.fp8_format is None:
        return 0
    return stage.matrix_elements(shape) - stage.num_ends(shape) * stage.site_elements(EMBED, shape)


def _head_gradient(stage: Stage, tokens: int) -> float:
    """What the last stage holds from its losses until backward: the hidden states' gradient, and the head's unless that
    is added to a buffer that is there anyway."""
    e, both = bytes_per_element(stage.config), stage.teacher.hidden_size + stage.student.hidden_size
    gathered = both if stage.tp > 1 else 0
    hidden = tokens * e * (stage.student.hidden_size + both / stage.tp + gathered)
    return hidden + (0 if _has_main_gradient_of_head(stage) else FP32) * stage.vocab_rows * stage.student.hidden_size


def _has_main_gradient_of_head(stage: Stage) -> bool:
    """In half precision always; in fp32 where both ends are trained themselves, in the buffer of data parallelism."""
    return bytes_per_element(stage.config) < FP32 or EMBED.name in stage.own


def _logits(stage: Stage, tokens: int, *, on_cuda: bool) -> float:
    chunk = min(stage.config.loss.chunk_tokens(on_cuda=on_cuda), tokens)
    one = chunk * stage.vocab_rows * FP32
    models = 2 if stage.config.total_kl_weight else 1
    slope = one if stage.student.logits_soft_cap else 0.0  # of the cap, for the gradient
    if on_cuda:
        return models * one + slope
    # Half-precision hidden states and rows of the head are widened, and a chunk's gradient of the head is made apart.
    widened = FP32 * (chunk + min(stage.vocab_rows, ROWS_AT_ONCE))
    is_narrow = bytes_per_element(stage.config) < FP32
    hidden_size = stage.teacher.hidden_size if models == 2 else stage.student.hidden_size
    beside = 0 if stage.tp == 1 else _LOGITS_BESIDE * models / 2
    apart = bytes_per_element(stage.config) * stage.vocab_rows * stage.student.hidden_size
    return (models + beside) * one + slope + is_narrow * (widened * hidden_size + apart)


def _pull_back(stage: Stage, *, on_cuda: bool) -> float:
    """Of the largest matrix: W_T, copied where its layout or its dtype needs it, dW_S in W_T's dtype on CUDA, and dP,
    whole and this rank's rows."""
    sites: list[Site] = list(LAYER_SITES) if stage.num_layers(stage.student) else []
    sites += [EMBED] if stage.is_first or stage.is_last else []
    e = bytes_per_element(stage.config)
    is_narrowed = on_cuda and stage.config.training.bf16

    def copies(site: Site) -> float:
        teacher, student = (stage.site_elements(site, shape) for shape in (stage.teacher, stage.student))
        of_layout = (site.name in "qkv") * e * teacher
        return of_layout + (e * student if is_narrowed else FP32 * teacher * (e < FP32))

    largest = max(map(copies, sites), default=0)
    return largest + FP32 * stage.projection_size * (1 + (1 / stage.tp if stage.tp > 1 else 0))


def _optimizer_step(stage: Stage, at_rest: MemoryParts, on_cuda: bool) -> float:
    """Adam's denominators: of one matrix at a time, on CUDA of all at once."""
    if on_cuda:
        moments = 2 if bytes_per_element(stage.config) == FP32 else 3
        return at_rest.optimizer / moments
    return 2 * FP32 * stage.projection_size / stage.tp
