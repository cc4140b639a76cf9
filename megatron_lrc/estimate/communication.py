"""What one rank sends in an optimizer step, counted from shapes.

Collectives count as rings send them: of a tensor that n ranks hold in parts, or sum into parts, each sends (n - 1) / n;
an all-reduce is both. What one rank sends to the others of its group, or gets the sum of, goes whole through each of
them. Left out is what does not grow with the model or the batch: loss sums, gradient norms.

Notation: D teacher hidden, d student hidden; `whole(h)` are the bytes of a micro-batch's activations of width h, over
all tensor parallel ranks, of this context parallel rank's tokens.
"""

from dataclasses import dataclass

from megatron_lrc.clone.sites import EMBED
from megatron_lrc.config import Config
from megatron_lrc.estimate.activations import FP32, bytes_per_element
from megatron_lrc.estimate.links import ranks_in_a_node
from megatron_lrc.estimate.stage import Stage

#: fp32 numbers per token that the tensor parallel ranks sum up for LM and KL: two maxima, seven sums. Another
#: divergence than the forward KL takes two sums more, and one over the top k four, and each rank's k largest logits.
_HEAD_SUMS, _DIVERGENCE_SUMS, _TOP_K_SUMS = 9, 2, 4


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a rank sends in a step, by the ranks that it exchanges them with.

    tensor: activations, and what LM and KL need of the vocabulary's parts. projections: P gathered by compose, its
    gradient scattered by pull back, gains' gradients. Both go over TP. ends: a tied P's gradient and value, between the
    first and the last stage. gradients: summed over the replicas, without the distributed optimizer all of the
    all-reduce. parameters: what of them the distributed optimizer gathers. composed, composed_gradients: with
    --share-compose W_S from who composes it, and dW_S to who pulls it back, between the replicas of a node.
    """

    tensor: float
    projections: float
    context: float
    pipeline: float
    gradients: float
    parameters: float
    ends: float
    composed: float
    composed_gradients: float

    @property
    def data(self) -> float:
        """Between replicas."""
        return self.gradients + self.parameters

    @property
    def over_tp(self) -> float:
        return self.tensor + self.projections


def traffic(stage: Stage, *, world_size: int) -> Traffic:
    """Of a rank of this stage. The stage's configuration is resolved for the world."""
    config, parallel = stage.config, stage.config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    e, num_microbatches = bytes_per_element(config), config.num_microbatches(world_size)
    sharing = sharing_replicas(config, world_size)
    tokens = config.training.micro_batch_size * config.training.seq_length / cp
    # Of a micro-batch each chunk's result goes forward, but the last one's; back goes the student's gradient, but the
    # first one's.
    forward, back = len(stage.layers) - stage.is_last, len(stage.layers) - stage.is_first
    widths = forward * (stage.teacher.hidden_size + stage.student.hidden_size) + back * stage.student.hidden_size
    return Traffic(
        tensor=num_microbatches * _activations(stage, tokens) * (tp - 1) / tp,
        projections=_projections(stage, sharing) * (tp - 1) / tp,
        context=num_microbatches * _keys_and_values(stage, tokens) * (cp - 1),
        pipeline=num_microbatches * tokens * widths * e / tp,
        **_between_replicas(stage, config.data_parallel_size(world_size) * cp),
        ends=_tied(stage),
        **_shared(stage, sharing),
    )


def sharing_replicas(config: Config, world_size: int) -> int:
    """Replicas among which --share-compose divides compose and pull back; 1 without it."""
    parallel = config.parallel
    if not parallel.share_compose:
        return 1
    replicas = config.data_parallel_size(world_size) * parallel.context_parallel_size
    return ranks_in_a_node(replicas, parallel.tensor_model_parallel_size)


def _activations(stage: Stage, tokens: float) -> float:
    """Gathered or scattered over TP in one micro-batch.

    Attention and MLP each gather their input and scatter their output. In backward the student's do the reverse, and
    gather the input once more for the weights' gradients. At the ends: embeddings scattered, the head's inputs
    gathered, and the student's gradients of these; but a student that looks up the teacher's embeddings has none.
    """
    teacher, student = stage.teacher.hidden_size, stage.student.hidden_size
    e = bytes_per_element(stage.config)
    again = _blocks_run_again(stage)
    blocks, own_blocks = 2 * stage.num_layers(stage.teacher), 2 * stage.num_layers(stage.student)
    width = blocks * 2 * teacher + own_blocks * 5 * student + again * 2 * (teacher + student)
    width += (stage.is_first + stage.is_last) * (teacher + 2 * student) - stage.looks_up * 2 * student
    return tokens * (width * e + _of_the_head(stage) * FP32 * stage.is_last)


def _of_the_head(stage: Stage) -> int:
    """Numbers per token that the losses over the vocabulary exchange, an all-reduce's twice."""
    loss, tp = stage.config.loss, stage.config.parallel.tensor_model_parallel_size
    if loss.kl_top_k:
        return 2 * (_HEAD_SUMS + _TOP_K_SUMS) + tp * loss.kl_top_k
    return 2 * (_HEAD_SUMS + _DIVERGENCE_SUMS * (loss.kl_divergence != "forward"))


def _blocks_run_again(stage: Stage) -> float:
    """Attention and MLP blocks of this stage that recomputation runs a second time, in both models."""
    parallel = stage.config.parallel
    if parallel.recompute_granularity == "full":
        layers = stage.num_layers(stage.student)
        if parallel.recompute_method == "block":
            layers = sum(min(parallel.recompute_num_layers, len(chunk)) for chunk in stage.student_layers)
        return 2.0 * layers
    if parallel.recompute_granularity == "selective" and "mlp" in parallel.recompute_modules:
        return 1.0 * stage.num_layers(stage.student)
    return 0.0


def _projections(stage: Stage, sharing: int) -> float:
    """P in its own precision, dP in fp32; the gains' gradients are summed. What only makes a matrix is gathered, and
    its gradient scattered, by one of `sharing` replicas: the mean of these."""
    whole = stage.projection_elements * stage.tp
    looked_up = stage.looks_up * stage.projection_size
    targets = sum(name not in stage.own for name in stage.targets) * stage.projection_size
    with_gradient = looked_up + (0 if stage.config.loss.detach_clone_targets else targets)

    def passed(by_all: float) -> float:
        return by_all + (whole - by_all) / sharing

    gains = stage.gain_elements(stage.student)
    p, gradients = passed(looked_up + targets), passed(with_gradient)
    return p * bytes_per_element(stage.config) + gradients * FP32 + 2 * gains * FP32


def _keys_and_values(stage: Stage, tokens: float) -> float:
    """A rank's own keys and values in one micro-batch: the teacher's once, the student's forward and backward."""
    passes = ((stage.teacher, 1), (stage.student, 2))
    groups = sum(times * stage.num_layers(shape) * shape.num_query_groups for shape, times in passes)
    return groups * 2 * stage.teacher.head_dim / stage.tp * tokens * bytes_per_element(stage.config)


def _between_replicas(stage: Stage, replicas: int) -> dict[str, float]:
    passed_on = stage.trained_elements * (replicas - 1) / replicas
    if not stage.config.parallel.use_distributed_optimizer:
        return {"gradients": 2 * FP32 * passed_on, "parameters": 0.0}
    return {"gradients": FP32 * passed_on, "parameters": bytes_per_element(stage.config) * passed_on}


def _shared(stage: Stage, replicas: int) -> dict[str, float]:
    """Gradients are gathered in fp32."""
    elements = stage.composed_elements if replicas > 1 else 0
    return {"composed": elements * bytes_per_element(stage.config), "composed_gradients": elements * FP32}


def _tied(stage: Stage) -> float:
    """The gradient of P, or of the embedding itself, summed over both ends; the first one's value sent to the last."""
    is_shared = stage.student.is_tied and stage.config.parallel.pipeline_model_parallel_size > 1
    if not is_shared or not (stage.is_first or stage.is_last):
        return 0.0
    is_own = EMBED.name in stage.own
    rows = stage.site_elements(EMBED, stage.student) if is_own else stage.projection_size / stage.tp
    return rows * (FP32 + bytes_per_element(stage.config) * stage.is_first)
