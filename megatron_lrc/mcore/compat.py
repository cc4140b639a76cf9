"""Differences between megatron-core versions (0.16 to 0.19), and defects of theirs to step round."""

import contextlib
import copy
import inspect
import itertools
import logging
import math
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed import ProcessGroup

#: What a parameter group has from the flags, alike in all groups; the scheduler sets the weight decay.
FLAG_SETTINGS = ("lr", "max_lr", "min_lr", "start_wd", "end_wd", "betas", "eps")

TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)  # before torch 2.7 the second was no subclass of the first


def chained_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """megatron-core's single optimizers, inside the chain that it may put round them."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def inner_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The torch (or TE, or apex) optimizers inside megatron-core's."""
    return [single.optimizer for single in chained_optimizers(optimizer) if single.optimizer is not None]


def owned_range(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> slice | None:
    """The part of a parameter's reduced `main_grad`, flat, that this rank counts among its data (and context)
    parallel ones.

    DistributedOptimizer: the range whose state this rank holds, None if that is empty; after a reduce-scatter
    nothing else in the buffer is complete. Otherwise every rank has all of it, and the first one counts it.
    """
    for single in chained_optimizers(optimizer):
        if parameter in getattr(single, "model_param_gbuf_map", {}):
            owned = single._get_model_param_range_map(parameter)["param"]
            return slice(owned.start, owned.end)
    is_first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    return slice(None) if is_first and not is_sharded(optimizer) else None


def is_sharded(optimizer: MegatronOptimizer) -> bool:
    """Whether it is a DistributedOptimizer, whose ranks hold a part of the state each."""
    return any(hasattr(single, "model_param_gbuf_map") for single in chained_optimizers(optimizer))


def state_of(
    optimizer: MegatronOptimizer, parameter: torch.nn.Parameter
) -> tuple[slice, dict[str, torch.Tensor]] | None:
    """The range of a parameter, flattened, whose state this rank has, and that state as flat views: `param` (what is
    stepped), `exp_avg`, `exp_avg_sq` and, while there is one, `grad`. None where other ranks have all of it."""
    for single in chained_optimizers(optimizer):
        # DistributedOptimizer: the state is of a flat shard of the parameter, found by the group's index.
        if parameter in getattr(single, "model_param_group_index_map", {}):
            group, order = single.model_param_group_index_map[parameter]
            main_param = single.optimizer.param_groups[group]["params"][order]
            owned = single._get_model_param_range_map(parameter)["param"]
            return slice(owned.start, owned.end), _flat_state(single.optimizer, main_param)
        if not hasattr(single, "model_param_gbuf_map") and single.optimizer is not None:
            # Otherwise of the whole parameter, or with bf16 and fp16 of its copy in fp32.
            main_param = getattr(parameter, "main_param", parameter)
            if main_param in single.optimizer.state:
                return slice(None), _flat_state(single.optimizer, main_param)
    return None


def _flat_state(inner: torch.optim.Optimizer, main_param: torch.Tensor) -> dict[str, torch.Tensor]:
    state = inner.state[main_param]
    flat = {"param": main_param.view(-1)}
    flat |= {name: state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")}
    return flat if main_param.grad is None else {**flat, "grad": main_param.grad.view(-1)}


def save_strategy(replicas: ProcessGroup) -> Any:
    """megatron-core's way to save, with the work shared by the ranks of a group that hold the same tensors.

    What is saved is the same each time: who writes what is found out once; a plan is kept when it has come twice.
    """
    strategy = get_default_save_sharded_strategy()
    strategy.use_cached_ckpt_structure = True
    return FullyParallelSaveStrategyWrapper(strategy, replicas, do_cache_distribution=True)


def request_save(state: dict[str, Any], folder: Path, strategy: Any, *, is_checked: bool) -> tuple[Any, queue.Queue]:
    """megatron-core's AsyncRequest to save a sharded state, planned by all ranks, and the queue in which its
    finalize functions look for what this rank has written. Nothing is written yet but common.pt.

    is_checked: that each part of each tensor is written by exactly one rank is known, from the save before.

    By itself megatron-core starts a server process for the queue, which costs its start and would die of a
    signal sent to the process group, and the checkpoint with it. 0.19 would take NVIDIA's resiliency
    extension, whose writers need CUDA; plan and format are the same.
    """
    takes_name = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    filesystem_async._results_queue = results = queue.Queue()
    with _quiet(serialization.__name__, torch_strategies.__name__):
        request = dist_checkpointing.save(
            state,
            str(folder),
            sharded_strategy=strategy,
            validate_access_integrity=not is_checked,
            async_sharded_save=True,
            **({"async_strategy": "mcore"} if takes_name else {}),
        )
    return request, results


@contextlib.contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Without the warnings that a folder is not empty, and that megatron-core's own saving will go."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any], *, num_updates: int) -> None:
    """`optimizer.load_state_dict`; torch's Adam gets its step counts back. num_updates: steps taken so far.

    Settings are those of the flags, not the saved ones. 0.19 finds a group's saved counterpart by its rates,
    among others, so they must agree before loading.

    torch's Adam counts steps for each parameter; TE's and apex's, for which megatron-core is written, for
    each group. So of the count, 0.16.1 and 0.19.2 save none at step 0, fail to load it under the
    DistributedOptimizer, and otherwise give all parameters one tensor, which a step then advances once for
    each of them. TE's refuses a parameter's `step`, as a checkpoint has it that torch's Adam wrote.
    """
    # Three repairs: the groups' rates before loading, torch's `step` while a shard is loaded, its value at the end.
    step = torch.tensor(float(num_updates))
    for single in chained_optimizers(optimizer):
        _keep_step_through_load(single)
    inner_state = state.get("optimizer", state)
    present = optimizer.param_groups[0]
    for group in inner_state["param_groups"]:
        group.update({key: present[key] for key in FLAG_SETTINGS if key in group and key in present})
    if "state" in inner_state:
        inner_state["state"].pop("common_step", None)
        if any(isinstance(inner, TORCH_ADAM) for inner in inner_optimizers(optimizer)):
            inner_state["state"]["common_step"] = step
    optimizer.load_state_dict(state)
    for inner in inner_optimizers(optimizer):
        set_step(inner, num_updates)


def find_saved_state_in_every_bucket(optimizer: MegatronOptimizer) -> None:
    """Have a DistributedOptimizer save each parameter's own state, whatever buckets its parameters lie in.

    0.16.1 and 0.19.2 gather the state of the buckets side by side, without the padding behind each, and then cut out
    every parameter's where it lies with that padding. So behind the first bucket that is padded they save the state of
    neighbours, fp32 parameters too, and a run that resumes from it has lost what it had learnt. Buckets are several
    with --overlap-grad-reduce, and one is padded if its length is no multiple of 128 and of the data parallel size.
    """
    for single in chained_optimizers(optimizer):
        if hasattr(single, "get_parameter_state_dp_zero"):
            _pad_gathered_state(single)


def _pad_gathered_state(optimizer: Any) -> None:
    gather = optimizer.get_parameter_state_dp_zero

    def gather_with_padding(*args: Any, **kwargs: Any) -> dict | None:
        state = gather(*args, **kwargs)
        for index, buffer in enumerate(optimizer.buffers if state else ()):
            for tensors in state[index].values():
                for name in ("param", "exp_avg", "exp_avg_sq"):
                    tensors[name] = _with_padding(tensors[name], buffer.buckets)
        return state

    optimizer.get_parameter_state_dp_zero = gather_with_padding


def _with_padding(gathered: torch.Tensor, buckets: list[Any]) -> torch.Tensor:
    """From the buckets' elements side by side to the places that they have in their buffer, flat."""
    if all(bucket.offset == start for bucket, start in zip(buckets, _starts(buckets), strict=True)):
        return gathered
    padded = gathered.new_zeros(buckets[-1].offset + buckets[-1].numel_unpadded)
    for bucket, start in zip(buckets, _starts(buckets), strict=True):
        padded[bucket.offset :][: bucket.numel_unpadded] = gathered[start:][: bucket.numel_unpadded]
    return padded


def _starts(buckets: list[Any]) -> list[int]:
    return [0, *itertools.accumulate(bucket.numel_unpadded for bucket in buckets)][:-1]


def set_step(inner: torch.optim.Optimizer, num_updates: int) -> None:
    """Have an Adam, torch's or TE's or apex's, take its next step as the one after `num_updates`."""
    if isinstance(inner, TORCH_ADAM):
        for parameter_state in inner.state.values():
            parameter_state["step"] = torch.tensor(float(num_updates))
        return
    for group in inner.param_groups:
        group["step"] = num_updates


def _keep_step_through_load(optimizer: MegatronOptimizer) -> None:
    """Let a DistributedOptimizer load `fully_reshardable` state, which has no `step`: it keeps its own."""
    set_state = getattr(optimizer, "_set_main_param_and_optimizer_states", None)
    if set_state is None:
        return

    def set_state_with_step(model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        main_param = optimizer.optimizer.param_groups[group]["params"][order]
        present = optimizer.optimizer.state[main_param]
        set_state(model_param, {"step": present["step"], **tensors} if "step" in present else tensors)

    optimizer._set_main_param_and_optimizer_states = set_state_with_step


def scale_rotation(attention: Any, factor: float) -> None:
    """Have cos and sin of an attention's RoPE multiplied by this, in the dtype of its angles. It is megatron-core's
    concentration factor of YaRN, which its own models have alike in all layers; 0.16 computes it in each forward pass
    from YaRN's settings. Fused kernels do not know it."""
    attention.config = copy.copy(attention.config)
    attention.config.apply_rope_fusion = attention.config.apply_rope_fusion and factor == 1.0
    if hasattr(attention, "_yarn_concentration_factor"):
        attention._yarn_concentration_factor = factor
    else:  # 1 + 0.1 mscale log(scaling factor), over the same with mscale_all_dim
        attention.config.yarn_rotary_scaling_factor = math.e
        attention.config.yarn_mscale, attention.config.yarn_mscale_all_dim = 10.0 * (factor - 1.0), 0.0
