"""Builds one pipeline stage of the frozen teacher or of the student, as an ordinary megatron-core GPTModel.

The layer spec is megatron-core's for Transformer Engine, or its local one, there with an RMSNorm that works
under sequence parallel (megatron-core's torch norm refuses it); with either, the attention may be that of
`attention.py`, and norms of what blocks give those of `norms.py`. `kernels.py` chooses. Every use of GPTModel is in
this file.
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnBackend, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lrc.clone.fusion import why_nothing_is_compiled
from megatron_lrc.clone.rotation import Rotations
from megatron_lrc.clone.vocabulary_shard import VocabularyShard
from megatron_lrc.config import Config, ConfigError, ModelShape
from megatron_lrc.mcore.attention import ScaledDotProductAttention
from megatron_lrc.mcore.kernels import (
    fuse_weight_gradients,
    fuses_rotary_embedding,
    uses_engine_attention,
    uses_transformer_engine,
)
from megatron_lrc.mcore.norms import AddNormed, RMSNorm, WideRMSNorm, ZeroCenteredRMSNorm, adds_multiple
from megatron_lrc.mcore.rotary import set_rotations

VOCAB_MULTIPLE = 128  # as Megatron-LM's --make-vocab-size-divisible-by: whole GEMM tiles on every rank


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The vocabulary, rounded up so that each tensor parallel rank has the same whole number of GEMM tiles."""
    multiple = VOCAB_MULTIPLE * tp_size
    return -(-vocab_size // multiple) * multiple


def vocabulary_shard(shape: ModelShape, tp_group: ProcessGroup) -> VocabularyShard:
    """This rank's rows of the embedding and the LM head."""
    padded = padded_vocab_size(shape.vocab_size, tp_group.size())
    return VocabularyShard.of(shape.vocab_size, padded, tp_group)


class OutputLayer(nn.Module):
    """Stands for GPTModel's output layer: holds the LM head's weight [v/tp, h] but hands on the hidden state.

    The losses take both models' final hidden states and heads together, a chunk of tokens at a time, so that no full
    logits exist. GPTModel transposes what an output layer gives; transposing first gives back [s/tp, b, h].
    """

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(
        self, hidden: Tensor, weight: object = None, runtime_gather_output: object = None
    ) -> tuple[Tensor, None]:
        return hidden.transpose(0, 1), None


def check_pipeline_layout(config: Config, shape: ModelShape) -> None:
    """Refuse a --pipeline-model-parallel-layout that megatron-core cannot read, or not for this model."""
    parallel = config.parallel
    text, pp = parallel.pipeline_model_parallel_layout, parallel.pipeline_model_parallel_size
    if text is None:
        return
    expected = (
        f"Expected is an E first, {shape.num_layers} t (the {config.base_role.noun}'s layers) and an L last, over "
        f"{pp} stages (--pipeline-model-parallel-size), or a multiple of it with "
        "--num-virtual-stages-per-pipeline-rank."
    )
    try:
        layout = PipelineParallelLayerLayout(text, pp)
        layout.validate_layer_layout(shape.num_layers, None)
    except (AssertionError, ValueError, KeyError, IndexError) as problem:
        raise ConfigError(f"--pipeline-model-parallel-layout {text}: {problem}. {expected}") from None
    if layout.virtual_pipeline_model_parallel_size != config.num_chunks:
        raise ConfigError(
            f"--pipeline-model-parallel-layout {text} has {len(layout.layout) * len(layout.layout[0])} stages, "
            f"{layout.virtual_pipeline_model_parallel_size} on each of {pp} ranks; "
            f"--num-virtual-stages-per-pipeline-rank says {config.num_chunks}. Make them agree."
        )


def layers_per_stage(config: Config, shape: ModelShape) -> list[list[int]]:
    """[pipeline rank][chunk]: how many layers each stage holds, as megatron-core divides them."""
    model_config = transformer_config(config, shape, torch.float32, is_trained=False)
    ranks, chunks = range(config.parallel.pipeline_model_parallel_size), range(config.num_chunks)
    if model_config.pipeline_model_parallel_layout is not None:
        layout = model_config.pipeline_model_parallel_layout.layout
        return [[layout[rank][chunk].count(LayerType.decoder) for chunk in chunks] for rank in ranks]
    return [[get_num_layers_to_build(model_config, vp_stage=chunk, pp_rank=rank) for chunk in chunks] for rank in ranks]


def transformer_config(config: Config, shape: ModelShape, dtype: torch.dtype, *, is_trained: bool) -> TransformerConfig:
    """megatron-core's configuration of one of the two models. Losses are sums over tokens."""
    recompute = config.parallel.recompute_granularity if is_trained else None
    parallel, compute = config.parallel, config.compute
    on_cpu = not torch.cuda.is_available()
    # megatron-core's fused kernels are compiled just in time; without CUDA that only costs minutes.
    is_compiled = not on_cpu and why_nothing_is_compiled() is None
    is_fp8 = compute.fp8_format is not None and (is_trained or compute.teacher_fp8)
    backend = compute.attention_backend if uses_engine_attention(config, dtype, shape) else "auto"
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        softmax_scale=shape.attention_multiplier,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        layernorm_zero_centered_gamma=shape.has_zero_centered_norms,
        gated_linear_unit=True,
        activation_func=F.silu if shape.activation == "silu" else gelu_tanh,
        add_bias_linear=False,
        add_qkv_bias=shape.has_qkv_bias,
        qk_layernorm=shape.has_qk_norm or shape.has_wide_qk_norm,
        **_by_layer(shape),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split,
        virtual_pipeline_model_parallel_size=parallel.num_virtual_stages_per_pipeline_rank,
        # With two stages, batched exchanges of several chunks between the same two ranks mix, and losses are
        # silently wrong from the third micro-batch on: the interleaved schedule sends each tensor by itself.
        overlap_p2p_comm=config.num_chunks > 1,
        batch_p2p_comm=config.num_chunks == 1,
        # It would wait for the whole device after each exchange, for the sake of torch before 1.13, whose requests
        # did not wait for theirs (pytorch/pytorch#82450).
        batch_p2p_sync=False,
        sequence_parallel=parallel.is_sequence_parallel and parallel.tensor_model_parallel_size > 1,
        tp_comm_overlap=parallel.tp_comm_overlap and is_trained,
        recompute_granularity=recompute,
        recompute_method=config.parallel.recompute_method if recompute == "full" else None,
        recompute_num_layers=config.parallel.recompute_num_layers if recompute == "full" else None,
        recompute_modules=list(config.parallel.recompute_modules) if recompute == "selective" else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        perform_initialization=False,  # the teacher is read, the student composed
        use_cpu_initialization=on_cpu,
        calculate_per_token_loss=True,
        bias_activation_fusion=is_compiled and shape.activation == "silu",
        bias_dropout_fusion=is_compiled,
        apply_rope_fusion=fuses_rotary_embedding(config, dtype),
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,  # of megatron-core's linears; TE's: `fuse_weight_gradients`
        attention_backend=AttnBackend[backend],
        deterministic_mode=compute.deterministic_mode,
        fp8=compute.fp8_format if is_fp8 else None,
        fp8_recipe=compute.fp8_recipe,
        fp8_amax_history_len=compute.fp8_amax_history_len,
        fp8_amax_compute_algo=compute.fp8_amax_compute_algo,
        first_last_layers_bf16=compute.first_last_layers_bf16 and is_fp8,
        num_layers_at_start_in_bf16=compute.num_layers_at_start_in_bf16,
        num_layers_at_end_in_bf16=compute.num_layers_at_end_in_bf16,
    )


def _by_layer(shape: ModelShape) -> dict[str, Any]:
    """TransformerConfig's fields for sliding windows and layers without RoPE. Its window does not count the query."""
    windowed = [int(shape.window(layer) is not None) for layer in range(shape.num_layers)]
    unrotated = [int(not shape.is_rotated(layer)) for layer in range(shape.num_layers)]
    values: dict[str, Any] = {"no_rope_freq": unrotated} if any(unrotated) else {}
    if any(windowed):
        values |= {"window_size": (shape.sliding_window - 1, 0), "window_attn_skip_freq": windowed}
    return values


def block_spec(config: Config, shape: ModelShape, dtype: torch.dtype, num_layers: int) -> TransformerBlockSubmodules:
    """What a stage's layers and the final norm are built of."""
    norm = ZeroCenteredRMSNorm if shape.has_zero_centered_norms else RMSNorm
    if uses_transformer_engine(config):
        from megatron.core.extensions.transformer_engine import TENorm

        layer = copy.deepcopy(get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.has_qk_norm))
        final_norm = TENorm
        _leave_out_norms_of_engine(layer.submodules, shape)
    else:
        layer = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.has_qk_norm))
        final_norm = norm
        layer.submodules.input_layernorm = norm if "input" in shape.norms else IdentityOp
        layer.submodules.pre_mlp_layernorm = norm if "post" in shape.norms else IdentityOp
        if shape.has_qk_norm:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = norm
    attention = layer.submodules.self_attention.submodules
    if shape.has_wide_qk_norm:
        attention.q_layernorm = WideRMSNorm.over(shape.num_attention_heads)
        attention.k_layernorm = WideRMSNorm.over(shape.num_query_groups)
    if not uses_engine_attention(config, dtype, shape):
        attention.core_attention = ScaledDotProductAttention.capped_at(shape.attention_soft_cap)
    model_config = transformer_config(config, shape, dtype, is_trained=False)
    layer.submodules.self_attn_bda = _adding("after_attention", shape, model_config) or layer.submodules.self_attn_bda
    layer.submodules.mlp_bda = _adding("after_mlp", shape, model_config) or layer.submodules.mlp_bda
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)


def _leave_out_norms_of_engine(layer: Any, shape: ModelShape) -> None:
    """Transformer Engine joins the norms before blocks to the linears behind them."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    if "input" not in shape.norms:
        layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    if "post" not in shape.norms:
        layer.mlp.submodules.linear_fc1 = TEColumnParallelLinear


def _adding(name: str, shape: ModelShape, model_config: TransformerConfig) -> Any:
    """What adds a block's output to the residual stream, where that is not megatron-core's own. name: of a norm."""
    if name in shape.norms:
        params = {
            "norm": ZeroCenteredRMSNorm if shape.has_zero_centered_norms else RMSNorm,
            "config": model_config,
            "hidden_size": shape.hidden_size,
            "eps": shape.norm_epsilon,
            "multiplier": shape.residual_multiplier,
        }
        return ModuleSpec(AddNormed, params=params)
    return adds_multiple(shape.residual_multiplier) if shape.residual_multiplier != 1.0 else None


def embedding_factor(shape: ModelShape, dtype: torch.dtype) -> float:
    """What embeddings are multiplied by. The root of the hidden size is rounded to the weights' dtype, as transformers
    does for Gemma."""
    if shape.scales_embeddings:
        return torch.tensor(shape.hidden_size**0.5, dtype=dtype).item()
    return shape.embedding_multiplier


def cap_logits(logits: Tensor, shape: ModelShape) -> Tensor:
    """c tanh(logits / c), in place, where the shape has a soft cap."""
    cap = shape.logits_soft_cap
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def multiply_output(multiplier: float, module: nn.Module, inputs: tuple, output: Any) -> Tensor:
    """A forward hook."""
    return output * multiplier


def build_stage(
    config: Config,
    shape: ModelShape,
    rotations: Rotations,
    *,
    dtype: torch.dtype,
    chunk: int,
    is_trained: bool,
    is_first_stage: bool,
    is_last_stage: bool,
) -> GPTModel:
    """One stage of a model of `shape`, its weights not yet set. chunk: which of this rank's virtual stages.

    rotations: the teacher's. megatron-core's own tying of embedding and LM head stays out of the way.
    """
    model_config = transformer_config(config, shape, dtype, is_trained=is_trained)
    num_layers = get_num_layers_to_build(model_config, vp_stage=chunk)
    model = GPTModel(
        config=model_config,
        transformer_layer_spec=block_spec(config, shape, dtype, num_layers),
        vocab_size=padded_vocab_size(shape.vocab_size, config.parallel.tensor_model_parallel_size),
        max_sequence_length=config.training.seq_length,
        pre_process=is_first_stage,
        post_process=is_last_stage,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        vp_stage=chunk,
    )
    set_rotations(model, shape, rotations, by_position=config.data.reset_position_ids)
    if is_first_stage and (factor := embedding_factor(shape, dtype)) != 1.0:
        model.embedding.register_forward_hook(partial(multiply_output, factor))
    if is_last_stage:
        model.output_layer = OutputLayer(model.output_layer.weight)
    tie_ends(model, shape)
    if is_trained and config.compute.gradient_accumulation_fusion and torch.finfo(dtype).bits == 16:
        fuse_weight_gradients(model)
    return model


def tie_ends(model: GPTModel, shape: ModelShape) -> None:
    """On a stage with both ends, a tied model's head is its embedding. Else each end has its own copy."""
    if shape.is_tied and model.pre_process and model.post_process:
        model.output_layer.weight = model.embedding.word_embeddings.weight


def layers_of(model: GPTModel) -> Iterator[tuple[int, nn.Module]]:
    """(global 0-based index, TransformerLayer) of each layer on this stage."""
    for layer in model.decoder.layers:
        yield int(layer.layer_number) - 1, layer


def norm_gains(model: GPTModel) -> dict[str, nn.Parameter]:
    """Global name (`layers.{i}.` and one of LAYER_NORMS, or `final`) -> gain [h] of each RMSNorm here, as stored."""
    gains = {}
    for index, layer in layers_of(model):
        found = {
            "input": _gain(layer.input_layernorm, layer.self_attention.linear_qkv),
            "after_attention": getattr(norm_after(layer, "after_attention"), "weight", None),
            "post": _gain(layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
            "after_mlp": getattr(norm_after(layer, "after_mlp"), "weight", None),
        }
        gains |= {f"layers.{index}.{name}": gain for name, gain in found.items() if gain is not None}
    if model.post_process:
        gains["final"] = model.decoder.final_layernorm.weight
    return gains


def _gain(norm: nn.Module, reader: nn.Module) -> nn.Parameter | None:
    """Of a norm, or with Transformer Engine of the linear that it is part of; `norm` is an identity then. None where
    there is neither."""
    return getattr(reader, "layer_norm_weight", getattr(norm, "weight", None))


def norm_after(layer: Any, name: str) -> nn.Module | None:
    """The norm of what attention or the MLP gives. name: `after_attention` or `after_mlp`."""
    adding = layer.self_attn_bda if name == "after_attention" else layer.mlp_bda
    return adding.norm if isinstance(adding, AddNormed) else None


def residual_readers(model: GPTModel) -> Iterator[tuple[str, nn.Module]]:
    """Where the residual stream is read on this stage: (global name of the norm there, the norm, or an identity in its
    place), whether the model has one there or not."""
    for index, layer in layers_of(model):
        yield f"layers.{index}.input", layer.input_layernorm
        yield f"layers.{index}.post", layer.pre_mlp_layernorm
    if model.post_process:
        yield "final", model.decoder.final_layernorm


def layer_input_norms(model: GPTModel) -> Iterator[tuple[int, nn.Module]]:
    """(global 0-based index, norm) where a layer of this stage reads its input; the final norm has
    num_layers."""
    for index, layer in layers_of(model):
        yield index, layer.input_layernorm
    if model.post_process:
        yield model.config.num_layers, model.decoder.final_layernorm
