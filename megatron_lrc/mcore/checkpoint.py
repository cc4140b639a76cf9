"""What a checkpoint holds, in megatron-core's sharded format: what trains, and its optimizer.

`projections.{name}` (D, d) and `norms.{name}` (d,), the names of `clone/sites.py`; of ordinary training the weights by
megatron-core's own names (`checkpoints/layout.py`). Optimizer state goes by the same names. They are global
tensors, readable at any layout; a vocabulary is padded for the layout that wrote it. `checkpoint_writer.py` writes it;
`checkpoints/` says how it lies on disk, and reads single tensors of it without any process group.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch import Tensor

from megatron_lrc.checkpoints.index import UnsafeCheckpoint, read_index, refuse_code
from megatron_lrc.checkpoints.run_directory import STATE_FILE, find_changed
from megatron_lrc.config import ConfigError
from megatron_lrc.mcore.delayed_scaling import scaling_state
from megatron_lrc.mcore.distributed import Groups, sum_over_world
from megatron_lrc.mcore.optimizer import StageOptimizer
from megatron_lrc.mcore.stages import PipelineStage, Trained

#: Optimizer state by parameter, readable at any layout. The default type of 0.16.1 raises (`flattened_range`).
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
#: fp32 copies of the parameters, as megatron-core's two kinds of optimizer name them.
_DISTRIBUTED_FP32, _REPLICATED_FP32 = "optimizer.state.param.", "optimizer.state.fp32_param."
_SHARDED = (ShardedBase, LocalNonpersistentObject)

T = TypeVar("T")


def damage_on_any_rank(path: Path) -> str | None:
    """What is wrong with a checkpoint's contents, in a few words, alike on every rank. Collective.

    Ranks that see the same files each read a share of them; whoever has a copy of its own reads that.
    """
    record = (path / STATE_FILE).stat()
    seen = _of_all_ranks((record.st_ino, record.st_mtime_ns, record.st_ctime_ns))  # what no copy has in common
    rank = dist.get_rank()
    sharers = [other for other, one in enumerate(seen) if one == seen[rank]]
    damages = _of_all_ranks(find_changed(path, part=sharers.index(rank), parts=len(sharers)))
    return next((damage for damage in damages if damage), None)


def _of_all_ranks(value: T) -> list[T]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


@torch.no_grad()
def load_checkpoint(path: Path, stages: Sequence[PipelineStage], optimizer: StageOptimizer) -> None:
    """Read what is trained and optimizer state of any layout into this rank's objects. Collective."""
    state = sharded_state(stages, optimizer, is_loading=True)
    expected = set(state["optimizer"])
    _, present = extract_matching_values(state["optimizer"], lambda value: isinstance(value, _SHARDED))
    # One after the other: what fp32 copies are read from may be the parameters' own tensors.
    _copy_parameters(_load(path, {"model": state.pop("model")})["model"], stages)
    loaded = _load(path, state)
    optimizer_state = {key: value for key, value in loaded["optimizer"].items() if key in expected}
    _fill_in(optimizer_state, present)
    weights = {name: weight.clone() for name, weight, _ in optimizer.stepped()}
    optimizer.load_state_dict(optimizer_state, num_updates=loaded["num_updates"])
    _check_fp32_parameters(path, optimizer, weights)
    _load_scaling_state(path, stages)


def _check_fp32_parameters(path: Path, optimizer: StageOptimizer, weights: Mapping[str, Tensor]) -> None:
    """ConfigError where the optimizer's fp32 parameters, as loaded, are not what the model's were rounded from.
    Collective. weights: the parts that this rank steps, as the model's part of the checkpoint has them."""
    wrong = [name for name, _, stepped in optimizer.stepped() if not _is_rounded(weights[name], stepped)]
    if name := next((name for names in _of_all_ranks(wrong) for name in names), None):
        raise ConfigError(
            f"{path} cannot be continued: its optimizer state of {name} does not belong to its weights. Earlier "
            "versions of megatron_lrc wrote some so with --overlap-grad-reduce and --use-distributed-optimizer. The "
            f"weights themselves are right: start a new run from them with --pretrained-checkpoint {path}."
        )


def _is_rounded(weight: Tensor, stepped: Tensor) -> bool:
    """To any of the dtypes, since a run may go on in another one; misplaced state is off by far more."""
    return torch.allclose(weight.float(), stepped.float(), rtol=1e-2, atol=1e-6)


def _load_scaling_state(path: Path, stages: Sequence[PipelineStage]) -> None:
    """Of --fp8-recipe delayed. A checkpoint of a run without it has none, and scales are found anew."""
    present, stored = scaling_state(stages), read_index(path).state_dict_metadata
    if not present or not present.keys() <= stored.keys():
        return
    for key, tensor in present.items():
        if stored[key].size != tensor.shape:
            raise ConfigError(
                f"{path} has an --fp8-amax-history-len of {stored[key].size[0]}, not {len(tensor)}. Repeat that one."
            )
    for key, tensor in _load(path, {"fp8": _sharded_scaling_state(stages)})["fp8"].items():
        present[key].copy_(tensor)


@torch.no_grad()
def load_weights(path: Path, stages: Sequence[PipelineStage], optimizer: StageOptimizer) -> None:
    """Read what is trained only; the optimizer starts anew from them. Collective."""
    trained = {saved.name: _sharded(saved, stage.groups) for stage in stages for saved in stage.trained()}
    loaded = _load(path, {"model": trained})["model"]
    for stage in stages:
        for saved in stage.trained():
            saved.parameter.copy_(loaded[saved.name])
    optimizer.optimizer.reload_model_params()  # its fp32 copies


def _load(path: Path, state: dict) -> dict:
    try:
        stored = refuse_code(path).state_dict_metadata  # megatron-core's loader would run it
    except UnsafeCheckpoint as error:
        raise ConfigError(f"{error}, so it is not loaded. Give a checkpoint that megatron_lrc wrote.") from None
    for value in nested_values(state):
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)) and value.key not in stored:
            value.key = _stored_name(value.key, stored)
    return dist_checkpointing.load(state, str(path))


def _stored_name(key: str, stored: Mapping[str, object]) -> str:
    """What a checkpoint of the other kind of optimizer calls the fp32 parameters: the distributed one keeps its own,
    the replicated one does with bf16 or fp16 only."""
    name = key.removeprefix(_DISTRIBUTED_FP32).removeprefix(_REPLICATED_FP32)
    return next((other for other in (_DISTRIBUTED_FP32 + name, _REPLICATED_FP32 + name, name) if other in stored), key)


def _fill_in(loaded: Any, present: Any) -> None:
    """What the optimizer has beside tensors and a checkpoint of the other kind of optimizer has not. All of it follows
    from the flags and the number of updates."""
    for key, value in present.items() if isinstance(present, dict) else enumerate(present):
        if isinstance(loaded, dict) and key not in loaded:
            loaded[key] = value
        elif isinstance(value, (dict, list)):
            _fill_in(loaded[key], value)


def _copy_parameters(loaded: dict[str, Tensor], stages: Sequence[PipelineStage]) -> None:
    for stage in stages:
        for saved in (*stage.trained(), *stage.fixed()):
            saved.parameter.copy_(loaded[saved.name])


def sharded_state(stages: Sequence[PipelineStage], optimizer: StageOptimizer, *, is_loading: bool) -> dict:
    """What is saved, or is to be loaded: this rank's tensors, with their places in the global ones."""
    optimizer.await_parameters()
    model = _sharded_model(stages)
    state = {
        "model": model,
        "optimizer": optimizer.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(_METADATA)),
        "num_updates": optimizer.lr_schedule.num_steps,
    }
    if not is_loading and (scaling := _sharded_scaling_state(stages)):
        state["fp8"] = scaling
    return state


def _sharded_scaling_state(stages: Sequence[PipelineStage]) -> dict[str, ShardedTensor]:
    groups = stages[0].groups
    replica = (0, groups.tp.rank(), groups.dp_cp.rank())
    return {
        key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica)
        for key, tensor in scaling_state(stages).items()
    }


def sharded_bytes(state: dict) -> int:
    """What all ranks together have to write of a sharded state. Collective."""
    tensors = (value for value in nested_values(state) if isinstance(value, (ShardedTensor, ShardedTensorFactory)))
    mine = sum(
        tensor.data.nbytes for tensor in tensors if tensor.data is not None and is_main_replica(tensor.replica_id)
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return int(sum_over_world(torch.tensor(mine, dtype=torch.int64, device=device)).item())


def _sharded_model(stages: Sequence[PipelineStage]) -> dict[str, ShardedBase]:
    return {
        saved.name: _sharded(saved, stage.groups) for stage in stages for saved in (*stage.trained(), *stage.fixed())
    }


def _sharded(trained: Trained, groups: Groups) -> ShardedBase:
    """A parameter with its place in the global tensor. What is replicated over TP, what is tied, and DP: replicas."""
    tp_rank, tp_size, dp_rank = groups.tp.rank(), groups.tp.size(), groups.dp_cp.rank()
    stacked = [] if trained.layer is None else [(0, *trained.layer)]
    split = [] if trained.split is None else [(trained.split + len(stacked), tp_rank, tp_size)]
    tensor = ShardedTensor.from_rank_offsets(
        trained.key,
        trained.parameter,
        *stacked,
        *split,
        replica_id=(int(trained.is_copy), 0 if split else tp_rank, dp_rank),
        prepend_axis_num=len(stacked),
        allow_shape_mismatch=trained.is_padded,
    )
    return apply_swiglu_sharded_factory(tensor, tuple(stacked)) if trained.is_gated else tensor
