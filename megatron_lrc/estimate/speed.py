"""How long a step may take: FLOPs at a stated share of the peak, the pipeline's bubble, and communication by volume.

An estimate to compare layouts with, not a promise: the share (--mfu) is an assumption, and so are the links' speeds
(`links.py`). Of communication only what the --overlap flags hide between replicas counts as overlapped, and with
--share-compose the composed matrices, which travel beside the teacher's first pass; where --overlap-param-gather
composes behind that, beside the student's. Recomputation counts as one more forward pass of the student's and the
teacher's recomputed blocks.
"""

from dataclasses import dataclass

from megatron_lrc.config import Config, ModelShape
from megatron_lrc.estimate.communication import sharing_replicas, traffic
from megatron_lrc.estimate.devices import Gpu
from megatron_lrc.estimate.flops import StepFlops, head_flops, layers_flops, step_flops
from megatron_lrc.estimate.links import neighbour_speed, ring_speed
from megatron_lrc.estimate.stage import Stage, stages_of

#: Share of the peak at which the GEMMs and everything between them are assumed to run, where nothing else is known.
DEFAULT_MFU = 0.35
SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step. compute: at --mfu of the peak. bubble: GPUs waiting for the pipeline to fill.
    communication: what a rank waits for. overlapped: what runs beside computation, not part of the total."""

    compute: float
    bubble: float
    communication: float
    overlapped: float
    tokens: int

    @property
    def total(self) -> float:
        return self.compute + self.bubble + self.communication

    @property
    def bubble_fraction(self) -> float:
        return self.bubble / self.total

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total


def step_time(
    config: Config, teacher: ModelShape, student: ModelShape, *, world_size: int, gpu: Gpu, mfu: float
) -> StepTime:
    """config: resolved for the world."""
    parallel, training = config.parallel, config.training
    assert training.global_batch_size is not None, "the configuration has been resolved"
    stages = list(stages_of(config, teacher, student))
    replicas = config.data_parallel_size(world_size) * parallel.context_parallel_size
    share = max(stage.largest_share(sharing_replicas(config, world_size)) for stage in stages)
    flops = step_flops(config, teacher, student, replicas=replicas * share)  # of the busiest ones
    met = student.num_layers / teacher.num_layers  # layers of the teacher that recomputation runs again
    again = (flops.teacher_forward * met + flops.student_forward) * _recomputed_share(config, student, teacher)
    speed = gpu.peak_flops(is_half=training.bf16 or training.fp16) * mfu
    passes = flops.total - flops.projections + again
    per_gpu = passes / world_size / speed
    slowest = per_gpu * _imbalance(config, teacher, student)
    num_microbatches = config.num_microbatches(world_size)
    bubble = (parallel.pipeline_model_parallel_size - 1) / (num_microbatches * config.num_chunks) * slowest
    beside = _Beside.of(flops, config, world_size, speed)
    communication, overlapped = max(_communication(stage, world_size, gpu, beside) for stage in stages)
    return StepTime(
        compute=per_gpu + flops.projections / world_size / speed,
        bubble=bubble + slowest - per_gpu,
        communication=communication,
        overlapped=overlapped,
        tokens=training.global_batch_size * training.seq_length,
    )


def _recomputed_share(config: Config, student: ModelShape, teacher: ModelShape) -> float:
    """Of a forward pass, what runs again in backward."""
    parallel = config.parallel
    if parallel.recompute_granularity == "full":
        if parallel.recompute_method == "uniform":
            return 1.0
        per_stage = student.num_layers / parallel.pipeline_model_parallel_size / config.num_chunks
        return min(parallel.recompute_num_layers / per_stage, 1.0)
    if parallel.recompute_granularity == "selective" and "mlp" in parallel.recompute_modules:
        mlp = 2.0 * 3 * teacher.hidden_size * teacher.ffn_hidden_size
        return mlp * teacher.num_layers / layers_flops(teacher, config.training.seq_length)
    return 0.0


def _imbalance(config: Config, teacher: ModelShape, student: ModelShape) -> float:
    """The slowest stage's work over the mean: the last one has both LM heads."""
    passes = ((teacher, 1), (student, 3))
    mean_layer = [layers_flops(shape, config.training.seq_length) / shape.num_layers for shape, _ in passes]

    def work_of(stage: Stage) -> float:
        return sum(
            count * (stage.num_layers(shape) * of_layer + stage.is_last * head_flops(shape))
            for (shape, count), of_layer in zip(passes, mean_layer, strict=True)
        )

    work = [work_of(stage) for stage in stages_of(config, teacher, student)]
    return max(work) / (sum(work) / len(work))


@dataclass(frozen=True, slots=True)
class _Beside:
    """Seconds of a rank's computation that its replicas' exchanges may run beside. sums: of gradients, the last
    micro-batch's backward pass and the pull back. gathers: of parameters, the teacher's first pass, and compose; where
    a pipeline fills that pass comes behind compose. composed: of matrices to other replicas, the next model's first
    pass."""

    sums: float
    gathers: float
    composed: float

    @classmethod
    def of(cls, flops: StepFlops, config: Config, world_size: int, speed: float) -> "_Beside":
        num_microbatches, per_rank = config.num_microbatches(world_size), world_size * speed
        passes = flops.student_backward, flops.teacher_forward, flops.student_forward
        backward, teacher, student = (work / num_microbatches for work in passes)
        compose = pull_back = flops.projections / 2
        is_whole = config.parallel.pipeline_model_parallel_size == 1
        composes_behind_teacher = config.parallel.overlap_param_gather and is_whole
        return cls(
            sums=(backward + pull_back) / per_rank,
            gathers=(is_whole * teacher + compose) / per_rank,
            composed=(student if composes_behind_teacher else teacher) / config.num_chunks / per_rank,
        )


def _communication(stage: Stage, world_size: int, gpu: Gpu, beside: _Beside) -> tuple[float, float]:
    """(seconds of a rank's collectives and sends that it waits for, seconds of those that overlap)."""
    sent = traffic(stage, world_size=world_size)
    parallel = stage.config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    replicas = stage.config.data_parallel_size(world_size) * cp
    between_replicas = ring_speed(replicas, tp, gpu)
    sums, gathers = sent.gradients / between_replicas, sent.parameters / between_replicas
    in_a_node = ring_speed(sharing_replicas(stage.config, world_size), tp, gpu)
    composed, composed_sums = sent.composed / in_a_node, sent.composed_gradients / in_a_node
    # The last bucket is complete when nothing is left that it could be summed beside; the last layer's dW_S too.
    last = min(_bucket_elements(stage.config, replicas) / max(stage.trained_elements, 1), 1.0) * sums
    last += composed_sums / max(stage.num_layers(stage.student), 1)
    sums += composed_sums
    waits = max(sums - beside.sums, last) if parallel.overlap_grad_reduce else sums
    waits += max(gathers - beside.gathers, 0.0) if parallel.overlap_param_gather else gathers
    waits += max(composed - beside.composed, 0.0)
    others = sent.over_tp / ring_speed(tp, 1, gpu) + sent.context / ring_speed(cp, tp, gpu)
    others += (sent.pipeline + sent.ends) / neighbour_speed(world_size, gpu)
    return others + waits, sums + gathers + composed - waits


def _bucket_elements(config: Config, replicas: int) -> int:
    return config.parallel.ddp_bucket_size or max(40_000_000, 1_000_000 * replicas)  # megatron-core's
