"""What a checkpoint holds, in megatron-core's sharded format: what trains, and its optimizer.

`projections.{name}` (D, d) and `norms.{name}` (d,), the names of `clone/sites.py`; of ordinary training the weights by
megatron-core's own names (`clone/checkpoint_layout.py`). Optimizer state goes by the same names. They are global
tensors, readable at any layout; a vocabulary is padded for the layout that wrote it. `run_directory.py` says how a
checkpoint lies on disk, and `checkpoint_writer.py` writes it. `open_checkpoint` reads single tensors of it without any
process group: that is what an export needs.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from megatron_lrc.checkpoint_boxes import read_box
from megatron_lrc.checkpoint_index import UnsafeCheckpoint, read_index, refuse_code
from megatron_lrc.clone.checkpoint_layout import SITES, all_boxes, box_of, rows_box
from megatron_lrc.clone.sites import EMBED, LM_HEAD, HeadLayout, select
from megatron_lrc.config import Config, ConfigError, ModelShape
from megatron_lrc.mcore.delayed_scaling import scaling_state
from megatron_lrc.mcore.distributed import Groups, sum_over_world
from megatron_lrc.mcore.optimizer import StageOptimizer
from megatron_lrc.mcore.paired_model import GAINS as NORMS
from megatron_lrc.mcore.paired_model import PROJECTIONS
from megatron_lrc.mcore.run_directory import STATE_FILE, find_changed, find_missing, newest_checkpoint, read_state
from megatron_lrc.mcore.stages import PipelineStage, Trained

#: Optimizer state by parameter, readable at any layout. The default type of 0.16.1 raises (`flattened_range`).
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
#: fp32 copies of the parameters, as megatron-core's two kinds of optimizer name them.
_DISTRIBUTED_FP32, _REPLICATED_FP32 = "optimizer.state.param.", "optimizer.state.fp32_param."
_SHARDED = (ShardedBase, LocalNonpersistentObject)


def damage_on_any_rank(path: Path) -> str | None:
    """What is wrong with a checkpoint's contents, in a few words. Each rank reads a share of its files. Collective."""
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, find_changed(path, part=dist.get_rank(), parts=len(everyone)))
    return next((damage for damage in everyone if damage), None)


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
    optimizer.load_state_dict(optimizer_state, num_updates=loaded["num_updates"])
    _load_scaling_state(path, stages)


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
    loaded = _load(path, {"model": _sharded_model(stages)})
    _copy_parameters(loaded["model"], stages)
    optimizer.optimizer.reload_model_params()  # its fp32 copies


def _load(path: Path, state: dict) -> dict:
    try:
        refuse_code(path)  # megatron-core's loader would run it
    except UnsafeCheckpoint as error:
        raise ConfigError(f"{error}, so it is not loaded. Give a checkpoint that megatron_lrc wrote.") from None
    stored = read_index(path).state_dict_metadata
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


# ------------------------------------------------------------------------------------------------ reading one process


class _Reader(FileSystemReader):
    """Reads by an index that has been read already, and safely."""

    def __init__(self, path: Path, index: Metadata):
        super().__init__(path)
        self._index = index

    def read_metadata(self, *_: object, **__: object) -> Metadata:
        return self._index


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint under one prefix, each read whole when it is asked for."""

    def __init__(self, reader: _Reader, sizes: dict[str, TensorStorageMetadata], prefix: str):
        self._reader, self._prefix = reader, prefix
        self._sizes = {key: size for key, size in sizes.items() if key.startswith(prefix)}

    def __getitem__(self, name: str) -> Tensor:
        key = self._prefix + name
        stored = self._sizes[key]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended: one process
            load_tensors({key: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)


class _Weights(Mapping[str, Tensor]):
    """The student's own weights in a checkpoint, by our names (`Weight.key`), rows in Hugging Face's order."""

    def __init__(self, reader: _Reader, index: Metadata, shape: ModelShape):
        self._reader, self._stored, self._shape = reader, index.state_dict_metadata, shape
        reader.set_up_storage_reader(index, is_coordinator=True)
        names = [
            name if box.layer is None else f"layers.{box.layer}.{name}"
            for box in all_boxes(shape)
            if box.key in self._stored
            for name in box.names
        ]
        self._names = dict.fromkeys(names)  # boxes are parts of tensors

    def __getitem__(self, name: str) -> Tensor:
        scope, _, kind = name.rpartition(".")
        if name in (EMBED.name, LM_HEAD.name):
            box = rows_box(self._shape, SITES[name], 0, self._shape.vocab_size)
        else:
            box = box_of(self._shape, kind, int(scope.split(".")[1]) if scope else None)
        stored = self._stored[box.key]
        assert isinstance(stored, TensorStorageMetadata)
        tensor = read_box(self._reader, stored, box)
        if len(box.names) == 1:
            return tensor
        return select(SITES[kind.removesuffix("_bias")], tensor, HeadLayout.of(self._shape)).flatten(0, 1)

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, slots=True)
class SavedStudent:
    """A checkpoint, open for reading in one process, on CPU.

    weights: those that are its own and not composed: all of them of ordinary training, whose projections and norms are
    empty. Projections of what is its own may be there too; they have made targets of the clone loss.
    """

    path: Path
    config: Config
    shape: ModelShape
    teacher_fingerprint: str
    step: int
    tokens: int
    projections: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    opened_at: int | None = None  # the step after which --open-after made some of them its own
    pruned_at: int | None = None  # the step after which --method sheared cut the model

    @property
    def is_composed(self) -> bool:
        """Whether all of its matrices are made of projections."""
        return not self.weights

    @property
    def dtype(self) -> torch.dtype:
        """Of what was trained."""
        return (self.norms or self.weights)["final"].dtype


def open_checkpoint(run: str) -> SavedStudent:
    """The newest checkpoint of a run directory, or the one that `run` itself is. ConfigError if it is damaged."""
    path = Path(run) if (Path(run) / STATE_FILE).is_file() else newest_checkpoint(run)
    if path is None:
        raise ConfigError(
            f"--load {run} holds no checkpoint (iter_NNNNNNN/{STATE_FILE}). Give a run directory, as --save wrote it."
        )
    state, config, shape = read_state(path)
    if damage := find_missing(path) or find_changed(path):
        raise ConfigError(f"{path} is damaged ({damage}). Use an older checkpoint of the run.")
    try:
        index = read_index(path)
    except UnsafeCheckpoint as error:
        raise ConfigError(f"{error}. Give a checkpoint that megatron_lrc wrote.") from None
    tensors = {key: size for key, size in index.state_dict_metadata.items() if isinstance(size, TensorStorageMetadata)}
    reader = _Reader(path, index)
    return SavedStudent(
        path=path,
        config=config,
        shape=shape,
        teacher_fingerprint=state.teacher_fingerprint,
        step=state.step,
        tokens=state.tokens,
        projections=_Tensors(reader, tensors, PROJECTIONS),
        norms=_Tensors(reader, tensors, NORMS),
        weights=_Weights(_Reader(path, index), index, shape),
        opened_at=state.opened_at,
        pruned_at=state.pruned_at,
    )
