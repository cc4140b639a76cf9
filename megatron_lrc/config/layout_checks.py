"""Checks of how the models are laid out over processes: TP, PP and its splits, CP, DP and the batch sizes.

`validation.py` calls them and raises what they find; each yields one line per error, in flag spelling.
"""

import math
from collections.abc import Iterator, Sequence

from .config import Config, ModelShape, flag_of
from .departures import propose_batches


def check_layout(config: Config, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    if tp > 1 and not parallel.is_sequence_parallel:
        yield (
            f"--tensor-model-parallel-size {tp} does not go with --no-sequence-parallel: every TP process would add "
            "the same tokens' gradient to the projections once more. Leave --no-sequence-parallel out."
        )
    if parallel.is_sequence_parallel and config.training.seq_length % (tp * cp):
        by_cp = f" times --context-parallel-size {cp}" * (cp > 1)
        yield (
            f"--seq-length {config.training.seq_length} is not divisible by --tensor-model-parallel-size {tp}{by_cp}, "
            f"which --sequence-parallel needs: each process takes an equal part. "
            f"Use --seq-length {round_up(config.training.seq_length, math.lcm(tp * cp, 2 * cp if cp > 1 else 1))}."
        )
    elif cp > 1 and config.training.seq_length % (2 * cp):
        yield (
            f"--seq-length {config.training.seq_length} is not divisible by twice --context-parallel-size {cp}: each "
            "process takes two pieces, one from either half of the sequence, so that causal attention is shared "
            f"equally. Use --seq-length {round_up(config.training.seq_length, 2 * cp)}."
        )
    if parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce:
        yield (
            "--ddp-bucket-size is for --overlap-grad-reduce: without it all gradients are summed at once. "
            "Set that too, or leave it out."
        )
    if parallel.overlap_param_gather:
        missing = [
            flag_of(name)
            for name in ("use_distributed_optimizer", "overlap_grad_reduce")
            if not getattr(parallel, name)
        ]
        if missing:
            yield (
                f"--overlap-param-gather needs {' and '.join(missing)}: it collects what the distributed optimizer has "
                "updated, in the buckets in which gradients are summed. Add what is missing, or leave it out."
            )
    each = config.model_parallel_size
    if world_size % each:
        by_cp = f" times --context-parallel-size {cp}" * (cp > 1)
        yield (
            f"{world_size} process{'es' * (world_size > 1)} cannot hold whole copies of the model: "
            f"--tensor-model-parallel-size {tp} times --pipeline-model-parallel-size {pp}{by_cp} takes {each} each. "
            f"Start a multiple of {each} processes."
        )
    for name in PIPELINE_ONLY:
        if getattr(parallel, name) and pp == 1:
            yield f"{flag_of(name)} needs several pipeline stages. Set --pipeline-model-parallel-size, or leave it out."
    sized = [flag_of(name) for name in PIPELINE_ONLY[:2] if getattr(parallel, name)]
    counted = [flag_of(name) for name in PIPELINE_ONLY[2:4] if getattr(parallel, name)]
    drawn = ["--pipeline-model-parallel-layout"] if parallel.pipeline_model_parallel_layout else []
    ways = [" and ".join(flags) for flags in (sized, counted, drawn) if flags]
    if len(ways) > 1:
        yield f"{ways[0]} cannot go with {' or '.join(ways[1:])}: two ways to divide the layers. Keep one."


#: Flags that mean nothing without pipeline stages: sizes of the end stages, what counts as a layer, chunks.
PIPELINE_ONLY = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
)


def check_batches(config: Config, world_size: int, presets: Sequence[str] = ()) -> Iterator[str]:
    """presets: names given with --preset, for the remark on their learning rate."""
    micro_batch, data_parallel = config.training.micro_batch_size, config.data_parallel_size(world_size)
    global_batch = config.global_batch_size(world_size)
    if data_parallel == 0:  # check_layout has reported too few processes
        return
    at_once = micro_batch * data_parallel
    if global_batch % at_once:
        remedy = propose_batches(config, global_batch, at_once, presets)
        if global_batch % data_parallel == 0:  # the batch need not change
            share = global_batch // data_parallel
            remedy = f"Use --micro-batch-size {max(size for size in divisors(share) if size < micro_batch)}"
        yield (
            f"--global-batch-size {global_batch} is not divisible by --micro-batch-size {micro_batch} times "
            f"{data_parallel} data-parallel replicas. {remedy}."
        )
        return
    pp, micro_batches = config.parallel.pipeline_model_parallel_size, global_batch // at_once
    if config.num_chunks > 1 and micro_batches % pp:
        yield (
            f"--num-virtual-stages-per-pipeline-rank {config.num_chunks} needs micro-batches in multiples of "
            f"--pipeline-model-parallel-size {pp}; these sizes make {micro_batches}. "
            f"{propose_batches(config, global_batch, at_once * pp, presets)}."
        )


def check_tensor_parallel(config: Config, teacher: ModelShape, *, has_projections: bool) -> Iterator[str]:
    """Heads, KV heads and FFN are split by megatron-core, the projections by us on d_T. The vocabulary is padded."""
    tp = config.parallel.tensor_model_parallel_size
    sizes = {
        "attention heads": teacher.num_attention_heads,
        "KV heads": teacher.num_query_groups,
        "FFN features": teacher.ffn_hidden_size,
    }
    if has_projections:
        sizes["hidden features"] = teacher.hidden_size
    noun, undivided = config.base_role.noun, [f"{size} {name}" for name, size in sizes.items() if size % tp]
    if undivided:
        possible = divisors(math.gcd(*sizes.values()))
        use = max(size for size in possible if size <= tp)
        yield (
            f"--tensor-model-parallel-size {tp} does not divide the {noun}'s {', '.join(undivided)}. Each "
            "process needs whole heads and KV heads (they are not replicated) and an equal share of the rest: "
            f"{join_or(possible)}. "
            f"Use --tensor-model-parallel-size {use}."
        )


def check_pipeline(config: Config, teacher: ModelShape) -> Iterator[str]:
    """Stages given by --decoder-first/last-pipeline-num-layers, then equal shares of what is left for the others."""
    parallel, layers = config.parallel, teacher.num_layers
    pp, chunks, noun = parallel.pipeline_model_parallel_size, config.num_chunks, config.base_role.noun
    if parallel.pipeline_model_parallel_layout:
        return  # checked where megatron-core reads it
    counted = parallel.account_for_embedding_in_pipeline_split + parallel.account_for_loss_in_pipeline_split
    if counted or chunks > 1:
        yield from check_chunks(config, layers + counted, layers)
        return
    ends = {"first": parallel.decoder_first_pipeline_num_layers, "last": parallel.decoder_last_pipeline_num_layers}
    given = {end: size for end, size in ends.items() if size is not None}
    others, left = pp - len(given), layers - sum(given.values())
    if left == 0 if others == 0 else (left >= others and left % others == 0):
        return
    if not given:
        remedy = f"Sizes that do: {join_or(divisors(layers))}." + suggest_last_stage(pp, layers)
        yield f"--pipeline-model-parallel-size {pp} does not divide the {noun}'s {layers} layers. {remedy}"
        return
    flags = " and ".join(f"--decoder-{end}-pipeline-num-layers {size}" for end, size in given.items())
    yield (
        f"{flags} {'leaves' if len(given) == 1 else 'leave'} {left} of the {noun}'s {layers} layers to "
        f"{others} other pipeline stage{'s' * (others != 1)}, which need equal shares of at least one."
        f"{suggest_last_stage(pp, layers)}"
    )


def check_overlap(config: Config, student: ModelShape) -> Iterator[str]:
    """With the distributed optimizer the sum leaves each process its own part only, and the two ends' parts differ."""
    parallel = config.parallel
    if not (parallel.overlap_grad_reduce and parallel.use_distributed_optimizer and student.is_tied):
        return
    if parallel.pipeline_model_parallel_size > 1:
        yield (
            "--overlap-grad-reduce with --use-distributed-optimizer and several pipeline stages cannot train a tied "
            "embedding, whose gradients on the first and the last stage are to be added. Leave one of the flags out."
        )


def check_chunks(config: Config, counted: int, layers: int) -> Iterator[str]:
    """Virtual stages, and splits in which an end counts as a layer: `counted` layers in all. Every share is alike."""
    parallel = config.parallel
    pp, chunks = parallel.pipeline_model_parallel_size, config.num_chunks
    ends = {"first": parallel.decoder_first_pipeline_num_layers, "last": parallel.decoder_last_pipeline_num_layers}
    given = {end: size for end, size in ends.items() if size is not None}
    others, left = pp - len(given), counted - sum(given.values())
    uneven = [f"--decoder-{end}-pipeline-num-layers {size}" for end, size in given.items() if size % chunks]
    if uneven:
        yield (
            f"{' and '.join(uneven)} cannot be divided over --num-virtual-stages-per-pipeline-rank {chunks}. "
            f"Use a multiple of {chunks}."
        )
    elif left < 0 or (left if others == 0 else left % (others * chunks) or left < others * chunks):
        extra = f" (counted as {counted} with the ends)" if counted != layers else ""
        yield (
            f"The {config.base_role.noun}'s {layers} layers{extra} cannot be divided alike over the {others * chunks} "
            f"stages that --pipeline-model-parallel-size {pp}, --num-virtual-stages-per-pipeline-rank {chunks} and the "
            f"sizes of the ends leave: {left} are left for them, and a multiple of {max(others * chunks, 1)} is "
            "needed. Change the number of stages, or the layers of the first and last "
            "(--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers)."
        )


def suggest_last_stage(pp: int, layers: int) -> str:
    """A split in which only the last stage, which also has the LM heads, differs from the others."""
    if pp == 1 or pp > layers:
        return ""
    each = -(-layers // pp)
    if (pp - 1) * each >= layers:
        each = layers // pp
    last = layers - (pp - 1) * each
    return f" With {pp}: --decoder-last-pipeline-num-layers {last} alone gives the others {each} each."


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def join_or(sizes: list[int]) -> str:
    """[1, 2, 4] -> '1, 2 or 4'."""
    *others, last = [str(size) for size in sizes]
    return f"{', '.join(others)} or {last}" if others else last
