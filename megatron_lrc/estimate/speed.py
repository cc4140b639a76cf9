"""How long a step may take: FLOPs at a stated share of the peak, the pipeline's bubble, and communication by volume.

An estimate to compare layouts with, not a promise: the share (--mfu) is an assumption, and so are the links' speeds.
Communication counts as not overlapped with computation, as without the --overlap flags. Recomputation counts as one
more forward pass of the student's and the teacher's recomputed blocks.
"""

from dataclasses import dataclass

from megatron_lrc.config import Config, ModelShape
from megatron_lrc.estimate.communication import traffic
from megatron_lrc.estimate.devices import GPUS_PER_NODE, Gpu
from megatron_lrc.estimate.flops import head_flops, layer_flops, step_flops
from megatron_lrc.estimate.stage import Stage, stages_of

#: Share of the peak at which the GEMMs and everything between them are assumed to run, where nothing else is known.
DEFAULT_MFU = 0.35
#: Share of a link's speed that collectives reach; assumed.
LINK_EFFICIENCY = 0.7
#: Bytes per second and direction between nodes, for each GPU: one 400 Gbit/s adapter. Assumed.
NODE_LINK = 50e9
SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step. compute: at --mfu of the peak. bubble: GPUs waiting for the pipeline to fill."""

    compute: float
    bubble: float
    communication: float
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
    replicas = config.data_parallel_size(world_size) * parallel.context_parallel_size
    flops = step_flops(config, teacher, student, replicas=replicas)
    again = (flops.teacher_forward + flops.student_forward) * _recomputed_share(config, teacher)
    speed = gpu.peak_flops(is_half=training.bf16 or training.fp16) * mfu
    passes = flops.total - flops.projections + again
    per_gpu = passes / world_size / speed
    slowest = per_gpu * _imbalance(config, teacher, student)
    num_microbatches = config.num_microbatches(world_size)
    bubble = (parallel.pipeline_model_parallel_size - 1) / (num_microbatches * config.num_chunks) * slowest
    return StepTime(
        compute=per_gpu + flops.projections / world_size / speed,
        bubble=bubble + slowest - per_gpu,
        communication=max(_communication(stage, world_size, gpu) for stage in stages_of(config, teacher, student)),
        tokens=training.global_batch_size * training.seq_length,
    )


def _recomputed_share(config: Config, teacher: ModelShape) -> float:
    """Of a forward pass, what runs again in backward."""
    parallel = config.parallel
    if parallel.recompute_granularity == "full":
        if parallel.recompute_method == "uniform":
            return 1.0
        per_stage = teacher.num_layers / parallel.pipeline_model_parallel_size / config.num_chunks
        return min(parallel.recompute_num_layers / per_stage, 1.0)
    if parallel.recompute_granularity == "selective" and "mlp" in parallel.recompute_modules:
        mlp = 2.0 * 3 * teacher.hidden_size * teacher.ffn_hidden_size
        return mlp / layer_flops(teacher, (config.training.seq_length + 1) / 2)
    return 0.0


def _imbalance(config: Config, teacher: ModelShape, student: ModelShape) -> float:
    """The slowest stage's work over the mean: the last one has both LM heads."""
    keys = (config.training.seq_length + 1) / 2
    layer = layer_flops(teacher, keys) + 3 * layer_flops(student, keys)
    heads = head_flops(teacher) + 3 * head_flops(student)
    work = [stage.num_layers * layer + stage.is_last * heads for stage in stages_of(config, teacher, student)]
    return max(work) / (sum(work) / len(work))


def _communication(stage: Stage, world_size: int, gpu: Gpu) -> float:
    """Seconds of a rank's collectives and sends: volume over the speed of the link that the group crosses."""
    sent = traffic(stage, world_size=world_size)
    parallel = stage.config.parallel
    tp = parallel.tensor_model_parallel_size
    with_cp = tp * parallel.context_parallel_size
    with_dp = with_cp * stage.config.data_parallel_size(world_size)

    def over(volume: float, reach: int) -> float:
        """reach: over how many neighbouring ranks the group extends."""
        link = gpu.nvlink if reach <= GPUS_PER_NODE else NODE_LINK
        return volume / (link * LINK_EFFICIENCY)

    return (
        over(sent.over_tp, tp)
        + over(sent.context, with_cp)
        + over(sent.data, with_dp)
        + over(sent.pipeline + sent.ends, world_size)
    )
