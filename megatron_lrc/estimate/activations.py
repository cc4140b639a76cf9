"""Bytes that one micro-batch keeps on a rank between its forward and its backward pass, and what passes on the way.

Derived from what autograd saves in megatron-core's layers as `mcore/gpt_models.py` builds them, and in the
clone loss; on CPU also measured (`tests/distributed/test_memory_estimate.py`). CUDA saves less, in two
places: torch's RMSNorm is one kernel there (a CPU composes it, in fp32), and so is megatron-core's SwiGLU.
What CUDA saves is derived, not measured.

All sizes are bytes per token of a micro-batch on this rank (its part of the sequence times the micro-batch
size).
"""

from dataclasses import dataclass

from megatron_lrc.config import Config, ModelShape
from megatron_lrc.estimate.stage import Stage
from megatron_lrc.methods import method_of

FP32 = 4


def bytes_per_element(config: Config) -> int:
    """Of parameters and activations."""
    return 2 if config.training.bf16 or config.training.fp16 else FP32


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """Of the attention or the MLP block of one layer.

    captured: the teacher's outputs, from its forward pass until the student has met them.
    saved: what the student's backward needs: norm, block, and the clone loss's pairs (of which the student's part is
        there anyway, but for o and down).
    teacher_input: kept for recomputation, which runs the teacher's block again.
    backward: made on the way back where a clone loss's gradient meets the activation's, less what is free by then.
    """

    captured: float
    saved: float
    teacher_input: float
    backward: float


def attention_bytes(
    config: Config, teacher: ModelShape, student: ModelShape, terms: set[str], *, on_cuda: bool
) -> BlockBytes:
    """terms: the clone terms that are on in this layer. Of the teacher's features, those are kept that the student
    has too."""
    e, cp = bytes_per_element(config), config.parallel.context_parallel_size
    queries, keys = student.num_attention_heads * student.head_dim, student.num_query_groups * student.head_dim
    compared = (queries + 2 * keys) * e if terms & {"q", "k", "v"} else 0
    saved = (queries + 2 * keys) * e + (queries + keys) * e + queries * e  # q, k, v; after RoPE; output
    if cp > 1:  # keys and values of all ranks; either piece's output, and both together
        saved = queries * e + cp * 2 * keys * e + 2 * queries * e + compared
    if student.has_qk_norm or student.has_wide_qk_norm:
        saved += (queries + keys) * (e if on_cuda else 2 * FP32 if e < FP32 else FP32)
    saved += FP32 * student.num_attention_heads  # logarithms of the softmax's sums
    captured, at_output = _output_bytes(config, teacher, "o" if "o" in terms else None)
    return _block(
        config,
        captured=compared + captured,
        saved=_norm_bytes(config, student, ("input", "after_attention"), on_cuda) + saved + compared + at_output,
        teacher_input=teacher.hidden_size * e if terms & {"q", "k", "v", "o"} else 0,
        backward=_gradient_bytes(compared, e, on_cuda),
    )


def mlp_bytes(
    config: Config, teacher: ModelShape, student: ModelShape, terms: set[str], *, on_cuda: bool
) -> BlockBytes:
    """The same of the MLP."""
    e, ffn = bytes_per_element(config), student.ffn_hidden_size
    compared = 2 * ffn * e if terms & {"gate", "up"} else 0
    norms = _norm_bytes(config, student, ("post", "after_mlp"), on_cuda)
    beyond = (1 if on_cuda else 3) * ffn * e  # silu(gate), a copy of up, and their product; on CUDA the product
    captured, at_output = _output_bytes(config, teacher, "down" if "down" in terms else None)
    return _block(
        config,
        captured=compared + captured,
        saved=norms + 2 * ffn * e + beyond + compared + at_output,
        teacher_input=teacher.hidden_size * e if terms & {"gate", "up", "down"} else 0,
        backward=max(_gradient_bytes(compared, e, on_cuda), 4 * ffn * e) - beyond,
    )


def _block(config: Config, **sizes: float) -> BlockBytes:
    """Everything in a block is divided over the tensor parallel ranks: features, or the sequence."""
    tp = config.parallel.tensor_model_parallel_size
    return BlockBytes(**{name: size / tp for name, size in sizes.items()})


def _norm_bytes(config: Config, student: ModelShape, norms: tuple[str, str], on_cuda: bool) -> float:
    """Of a block's norms: their input, their input normed, and of one before the block its output, which a linear layer
    takes; where there is none, it takes the residual stream, which is there anyway. norms: before and after it."""
    e, (before, after) = bytes_per_element(config), norms
    kept = (2 * e if on_cuda else 2 * FP32 + e) * (before in student.norms)
    kept += (e if on_cuda else 2 * FP32) * (after in student.norms)
    return student.hidden_size * kept


def _output_bytes(config: Config, teacher: ModelShape, term: str | None) -> tuple[float, float]:
    """What the teacher's o or down output takes: captured, and in what is saved at the student's."""
    assert config.model.student_hidden_size is not None
    e, loss = bytes_per_element(config), config.loss
    wide, narrow = teacher.hidden_size * e, config.model.student_hidden_size * e
    if term is None:
        return 0, 0
    if term == "o" and loss.clone_attention_output == "teacher":
        return wide, 2 * wide
    return wide, 2 * narrow + (0 if loss.detach_clone_targets else wide)  # the gradient of P needs the teacher's


def _gradient_bytes(compared: float, e: int, on_cuda: bool) -> float:
    """Of a clone loss: the gradient that comes along and the one that goes on; without fusion two steps
    between, which are in fp32."""
    return compared / e * (2 * e if on_cuda else e + 2 * FP32)


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Of a stage, all its chunks together.

    kept: from forward to backward. forward: at most in the forward pass, which with recomputation has the
    teacher's captures besides (all of its layers run before the student's first; those without a layer of the
    student's are not captured). backward: made on the way
    back, recomputed activations included.
    """

    kept: float
    forward: float
    backward: float


def stage_bytes(stage: Stage, *, on_cuda: bool) -> StageBytes:
    config, e = stage.config, bytes_per_element(stage.config)
    narrow = stage.student.hidden_size * e / stage.tp
    kept = forward = at_once = backward = 0.0
    for place, layer in enumerate(index for chunk in stage.student_layers for index in chunk):
        terms = method_of(config).terms_of(layer)
        attention = attention_bytes(config, stage.teacher, stage.student, terms, on_cuda=on_cuda)
        mlp = mlp_bytes(config, stage.teacher, stage.student, terms, on_cuda=on_cuda)
        rope = 4 * stage.teacher.head_dim * e / config.training.micro_batch_size  # cos and sin, of q and of k
        again = _recomputed_blocks(config, place, [attention, mlp])
        of_layer = narrow if len(again) == 2 else attention.saved + rope + (narrow if again else mlp.saved)
        of_layer += sum(block.teacher_input for block in again)
        kept += of_layer
        forward += max(of_layer + sum(block.captured for block in again), of_layer)
        at_once = max(at_once, sum(block.saved + block.captured for block in again))
        backward = max(backward, attention.backward, mlp.backward)
    if config.parallel.recompute_granularity == "full" and config.parallel.recompute_method == "uniform":
        at_once *= config.parallel.recompute_num_layers
    both = (stage.teacher.hidden_size + stage.student.hidden_size) * e / stage.tp
    chunks = config.num_chunks
    ends = both * (2 * chunks - stage.is_first - stage.is_last) + narrow * stage.is_first  # what came in and went out
    ends += stage.looks_up * stage.teacher.hidden_size * e / stage.tp  # the teacher's embeddings, for dP
    return StageBytes(kept + ends, forward + ends, at_once + backward)


def _recomputed_blocks(config: Config, place: int, blocks: list[BlockBytes]) -> list[BlockBytes]:
    """Which of a layer's two blocks are recomputed. The core of attention has nothing to save that others do not need.

    place: which layer of its stage.
    """
    parallel = config.parallel
    if parallel.recompute_granularity == "selective":
        return blocks[1:] if "mlp" in parallel.recompute_modules else []
    if parallel.recompute_granularity == "full":
        return blocks if parallel.recompute_method == "uniform" or place < parallel.recompute_num_layers else []
    return []


def micro_batches_in_flight(stage: Stage, num_microbatches: int) -> float:
    """Micro-batches whose activations a rank holds at once, each of all its chunks: 1F1B, plain or interleaved."""
    pp, chunks = stage.config.parallel.pipeline_model_parallel_size, stage.config.num_chunks
    if chunks == 1:
        return min(num_microbatches, pp - stage.rank)
    warmup = 2 * (pp - stage.rank - 1) + (chunks - 1) * pp
    return min(num_microbatches * chunks, warmup + 1) / chunks
