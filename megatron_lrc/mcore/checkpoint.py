"""Checkpoints: megatron-core's sharded format for what trains and its optimizer, a small JSON for everything else.

    RUN/iter_0000100/            appears under this name only when complete
        *.distcp, .metadata ...  projections, norm gains, optimizer state: global tensors, readable at any layout
        run.json                 step, samples and tokens seen, resolved configuration, student's shape, teacher's
                                 fingerprint (not its weights)

Keys: `projections.{name}` (D, d) and `norms.{name}` (d,), the names of `clone/sites.py`; optimizer state by the same
names. `open_checkpoint` reads single tensors of it without any process group: that is what an export needs.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from megatron_lrc import __version__
from megatron_lrc.config import Config, ConfigError, ModelShape
from megatron_lrc.mcore.compat import keep_results_in_process
from megatron_lrc.mcore.optimizer import ProjectionOptimizer
from megatron_lrc.mcore.paired_model import PairedModel

STATE_FILE = "run.json"
PROJECTIONS, NORMS = "projections.", "norms."
#: Optimizer state by parameter, readable at any layout. The default type of 0.16.1 raises (`flattened_range`).
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(slots=True)
class RunState:
    """Where a run stands. `consumed_samples` is its position in the order of samples, which the flags alone decide."""

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    data_order: str = ""  # hash over what decides that order (`data/sample_order.py`); not known to older checkpoints
    teacher_fingerprint: str = ""
    grad_norm_mean: float = 0.0  # running mean over the steps taken, for --spike-factor
    grad_norm_count: int = 0


def checkpoint_path(run: str, step: int) -> Path:
    return Path(run) / f"iter_{step:07d}"


def newest_checkpoint(run: str) -> Path | None:
    """The complete checkpoint with the highest step in a run directory."""
    complete = [path for path in Path(run).glob("iter_[0-9]*") if (path / STATE_FILE).is_file()]
    return max(complete, key=lambda path: int(path.name.removeprefix("iter_")), default=None)


def read_state(path: Path) -> tuple[RunState, Config, ModelShape]:
    """run.json of a checkpoint: counters, the configuration it was trained with, the student's shape."""
    try:
        values = json.loads((path / STATE_FILE).read_text())
        return RunState(**values["state"]), Config.from_dict(values["config"]), ModelShape(**values["student_shape"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path / STATE_FILE} cannot be read ({error}): written by another version, or damaged. "
            "Use a checkpoint of this version of megatron_lrc, or an older one of the same run."
        ) from None


# ------------------------------------------------------------------------------------------------ training


def save_checkpoint(
    run: str, state: RunState, config: Config, stages: list[PairedModel], optimizer: ProjectionOptimizer
) -> Path:
    """Write RUN/iter_{step}. Collective. A crash leaves a .partial folder behind, never a half checkpoint."""
    final = checkpoint_path(run, state.step)
    partial = final.with_name(final.name + ".partial")
    is_main = dist.get_rank() == 0
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    keep_results_in_process()
    dist_checkpointing.save(_sharded_state(stages, optimizer, is_loading=False), str(partial))
    dist.barrier()
    if is_main:
        values = {
            "megatron_lrc": __version__,
            "state": asdict(state),
            "student_shape": asdict(stages[0].shapes.student),
            "config": config.to_dict(),
        }
        (partial / STATE_FILE).write_text(json.dumps(values, indent=1) + "\n")
        shutil.rmtree(final, ignore_errors=True)  # a resumed run comes by the same step again
        os.replace(partial, final)
    dist.barrier()
    return final


@torch.no_grad()
def load_checkpoint(path: Path, stages: list[PairedModel], optimizer: ProjectionOptimizer) -> None:
    """Read projections, gains and optimizer state of any layout into this rank's objects. Collective."""
    loaded = dist_checkpointing.load(_sharded_state(stages, optimizer, is_loading=True), str(path))
    for stage in stages:
        for key, parameter in _named_parameters(stage):
            parameter.copy_(loaded["model"][key])
    optimizer.load_state_dict(loaded["optimizer"], num_updates=loaded["num_updates"])


def _named_parameters(stage: PairedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, matrix in stage.projections.named_matrices():
        yield PROJECTIONS + name, matrix
    for name, gain in stage.projections.named_norms():
        yield NORMS + name, gain


def _sharded_state(stages: list[PairedModel], optimizer: ProjectionOptimizer, *, is_loading: bool) -> dict:
    model = {key: tensor for stage in stages for key, tensor in _sharded_parameters(stage).items()}
    return {
        "model": model,
        "optimizer": optimizer.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(_METADATA)),
        "num_updates": optimizer.lr_schedule.num_steps,
    }


def _sharded_parameters(stage: PairedModel) -> dict[str, ShardedTensor]:
    """Each parameter with its place in the global tensor. P: rows over TP. Gains, the tied P, and DP: replicas."""
    groups, sharded = stage.groups, {}
    tp_rank, tp_size, dp_rank = groups.tp.rank(), groups.tp.size(), groups.dp_cp.rank()
    for key, parameter in _named_parameters(stage):
        if key.startswith(PROJECTIONS):
            is_copy = int(getattr(parameter, "shared", False))
            sharded[key] = ShardedTensor.from_rank_offsets(
                key, parameter, (0, tp_rank, tp_size), replica_id=(is_copy, 0, dp_rank)
            )
        else:
            sharded[key] = ShardedTensor.from_rank_offsets(key, parameter, replica_id=(0, tp_rank, dp_rank))
    return sharded


# ------------------------------------------------------------------------------------------------ reading one process


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint under one prefix, each read whole when it is asked for."""

    def __init__(self, reader: CachedMetadataFileSystemReader, sizes: dict[str, TensorStorageMetadata], prefix: str):
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


@dataclass(frozen=True, slots=True)
class SavedStudent:
    """A checkpoint, open for reading in one process, on CPU."""

    path: Path
    config: Config
    shape: ModelShape
    teacher_fingerprint: str
    step: int
    tokens: int
    projections: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]


def open_checkpoint(run: str) -> SavedStudent:
    """The newest complete checkpoint of a run directory, or the checkpoint that `run` itself is."""
    path = Path(run) if (Path(run) / STATE_FILE).is_file() else newest_checkpoint(run)
    if path is None:
        raise ConfigError(
            f"--load {run} holds no checkpoint (iter_NNNNNNN/{STATE_FILE}). Give a run directory, as --save wrote it."
        )
    state, config, shape = read_state(path)
    reader = CachedMetadataFileSystemReader(str(path))
    try:
        sizes = reader.read_metadata().state_dict_metadata
    except OSError as error:
        raise ConfigError(f"{path} is damaged ({error}). Use an older checkpoint of the run.") from None
    tensors = {key: size for key, size in sizes.items() if isinstance(size, TensorStorageMetadata)}
    return SavedStudent(
        path=path,
        config=config,
        shape=shape,
        teacher_fingerprint=state.teacher_fingerprint,
        step=state.step,
        tokens=state.tokens,
        projections=_Tensors(reader, tensors, PROJECTIONS),
        norms=_Tensors(reader, tensors, NORMS),
    )
