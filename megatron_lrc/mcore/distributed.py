"""Process groups, device, seeds; and the few collectives used outside megatron-core, each named for what it does.

torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) says who this process is; without it the
run is a world of one. NCCL where CUDA is available, gloo elsewhere. The groups are megatron-core's own.
"""

import json
import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.rendezvous import rendezvous

from megatron_lrc.config import Config
from megatron_lrc.console import say
from megatron_lrc.launch import peers, torchrun
from megatron_lrc.launch.agreement import RanksMissing
from megatron_lrc.launch.environment import RESOLVED_WITHIN, await_name
from megatron_lrc.launch.peer_hub import Hub
from megatron_lrc.mcore import cpu
from megatron_lrc.mcore.compiler import try_compiler

_ADDRESS_BYTES = 512


@dataclass(frozen=True, slots=True)
class Groups:
    """This rank's place: process groups (each with rank and size) and device."""

    tp: ProcessGroup
    pp: ProcessGroup
    cp: ProcessGroup
    dp: ProcessGroup  # ranks with other sequences; those of `cp` have other parts of the same ones
    dp_cp: ProcessGroup  # both: over these gradients are summed, and copies of every parameter lie
    embedding: ProcessGroup | None
    device: torch.device
    #: With --share-compose: of dp_cp, the ranks on this one's node. None without, or where there is no other.
    sharing: ProcessGroup | None = None

    @property
    def is_first_rank(self) -> bool:
        return self.pp.rank() == 0

    @property
    def is_last_rank(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1

    @property
    def is_main_rank(self) -> bool:
        """The one rank that writes to the console and to run files."""
        return dist.get_rank() == 0


def world_size() -> int:
    """Processes of the run, by torchrun's environment; known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True, slots=True)
class Meeting:
    """The store through which the ranks of a run find each other: what they tell each other there needs no process
    group, and can wait no longer than they want."""

    store: Store
    rank: int
    world_size: int


def meet(config: Config) -> Meeting:
    """Come to the store that torchrun's environment names; a process without others, or one whose process group exists
    already, has one of its own. Rank 0 waits for the others here only where no torchrun keeps the store."""
    if dist.is_initialized():
        return Meeting(_get_default_store(), dist.get_rank(), dist.get_world_size())
    is_alone = os.environ.get("WORLD_SIZE") == "1" and "MASTER_ADDR" not in os.environ
    if "RANK" not in os.environ or is_alone:
        return Meeting(dist.HashStore(), 0, 1)  # type: ignore[attr-defined]
    store, rank, size = _come_together(_timeout(config))
    # torchrun's store outlives a restart, and in it are the addresses of processes that are gone.
    return Meeting(PrefixStore(f"attempt_{torchrun.restarts()}", store), rank, size)


def _come_together(timeout: timedelta) -> tuple[Store, int, int]:
    """RanksMissing, with the cause, where the store cannot be found or reached in time."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    place = f"the store at which the ranks meet, MASTER_ADDR {host}, MASTER_PORT {port}"
    if reason := await_name(host, min(RESOLVED_WITHIN, timeout.total_seconds())):
        raise RanksMissing(
            f"Rank {os.environ['RANK']} cannot find {place}: this machine does not know the name ({reason}). Set "
            "MASTER_ADDR to a name or an address by which every node reaches the first one."
        )
    try:
        return next(rendezvous("env://", timeout=timeout))
    except RuntimeError as error:  # torch's DistError is one
        reason = " ".join(str(error).partition("\nException raised from")[0].split())[:300]
        raise RanksMissing(
            f"Rank {os.environ['RANK']} cannot meet the others in {place} ({reason}). The wait ends after "
            f"--distributed-timeout-minutes ({timeout.total_seconds() / 60:g}). See whether the first node has started "
            "and its port is free, and can be reached from here."
        ) from error


def start(config: Config, meeting: Meeting | None = None) -> Groups:
    """Join the world of those that met, make megatron-core's groups for `config.parallel`, and on CUDA agree whether to
    compile. `stop()` undoes it."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        met = meeting or meet(config)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=_timeout(config),
            store=met.store,
            rank=met.rank,
            world_size=met.world_size,
        )
    cpu.activate()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        context_parallel_size=config.parallel.context_parallel_size,
        virtual_pipeline_model_parallel_size=config.parallel.num_virtual_stages_per_pipeline_rank,
        distributed_timeout_minutes=config.parallel.distributed_timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.training.seed)
    torch.manual_seed(config.training.seed)
    try_compiler(device)
    return Groups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        embedding=parallel_state.get_embedding_group(check_initialized=False),
        device=device,
        sharing=_replicas_on_node(config) if config.parallel.share_compose else None,
    )


def _replicas_on_node(config: Config) -> ProcessGroup | None:
    """The replicas of what this rank holds whose tensor parallel ranks are on the same nodes as its own: these all find
    the same replicas. A node is a machine, or what one torchrun has started there. Collective."""
    tp = parallel_state.get_tensor_model_parallel_group()
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    nodes: list = [None] * tp.size()
    dist.all_gather_object(nodes, (socket.gethostname(), os.environ.get("GROUP_RANK")), tp)
    places: list = [None] * dist.get_world_size()
    dist.all_gather_object(places, (dist.get_process_group_ranks(replicas)[0], *nodes))
    at_place: dict[tuple, list[int]] = {}
    for rank, place in enumerate(places):
        at_place.setdefault(place, []).append(rank)
    # All ranks make all groups. torch has a way for a group's own ranks to make it, but that names it by how many
    # groups each of them is in.
    shared = [ranks for ranks in at_place.values() if len(ranks) > 1]
    return dist.new_subgroups_by_enumeration(shared, timeout=_timeout(config))[0] if shared else None


def describe_sharing(groups: Groups) -> str:
    """What --share-compose comes to, on this rank's node."""
    if groups.sharing is None:
        return "--share-compose is off: this node has one replica, and none to divide compose and pull back with"
    return f"compose and pull back are divided among the {groups.sharing.size()} replicas of a node"


def _timeout(config: Config) -> timedelta:
    return timedelta(minutes=config.parallel.distributed_timeout_minutes)


def watch_peers(groups: Groups) -> None:
    """Have this rank told when another one fails, until `stop` (`launch/peers.py`). Collective."""
    if dist.get_world_size() == 1:
        return
    message = torch.zeros(_ADDRESS_BYTES, dtype=torch.uint8, device=groups.device)
    if groups.is_main_rank:
        num_local = os.environ.get("LOCAL_WORLD_SIZE")
        hub = Hub(dist.get_world_size(), is_one_machine=num_local == str(dist.get_world_size()))
        address = json.dumps(hub.address).encode()
        message[: len(address)] = torch.tensor(list(address), dtype=torch.uint8)
        hub.start()
    address = json.loads(bytes(broadcast_from_first(message).tolist()).rstrip(b"\0"))
    try:
        peers.join(dist.get_rank(), address)
    except OSError as error:  # a firewall, perhaps: the run can do without
        say(f"warning: rank {dist.get_rank()} will not hear of other ranks' failures: {error}", sys.stderr)


def stop() -> None:
    """Leave megatron-core's groups and the world."""
    peers.leave()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_world(partial: torch.Tensor) -> torch.Tensor:
    """Sum, in place, what each rank holds a disjoint part of (token counts, loss sums, second moments)."""
    dist.all_reduce(partial)
    return partial


def sum_over_stage(partial: torch.Tensor) -> torch.Tensor:
    """Sum, in place, over the ranks that hold the same pipeline stage. With tensor parallelism for what each rank has
    of its own tokens, or in a mean for what they have alike."""
    dist.all_reduce(partial, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    return partial


def sum_over_tp(partial: torch.Tensor, *, is_scattered: bool) -> torch.Tensor:
    """What row parallel linears give, of partial sums [s, b, h]: complete, or with sequence parallelism this rank's
    tokens of it [s/tp, b, h]."""
    if is_scattered:
        return tensor_parallel.reduce_scatter_to_sequence_parallel_region(partial)
    return tensor_parallel.reduce_from_tensor_model_parallel_region(partial)


def reduce_over_stage(partial: torch.Tensor, turn: int) -> bool:
    """Sum, in place, over the ranks that hold the same pipeline stage. The sum is complete on one of them only, chosen
    by `turn`; whether it is this one. With tensor parallelism for what each rank has of its own tokens."""
    group, owner = _stage_group(turn)
    dist.reduce(partial, dst=owner, group=group)
    return dist.get_rank() == owner


def broadcast_over_stage(value: torch.Tensor, turn: int) -> torch.Tensor:
    """Make `value` that of the rank which `reduce_over_stage` chose by `turn`, in place, on the stage's ranks."""
    group, owner = _stage_group(turn)
    dist.broadcast(value, src=owner, group=group)
    return value


def _stage_group(turn: int) -> tuple[ProcessGroup, int]:
    """The ranks that hold the same pipeline stage as this one, and the one (of the world) whose turn it is."""
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return group, dist.get_process_group_ranks(group)[turn % group.size()]


def broadcast_from_first(value: torch.Tensor) -> torch.Tensor:
    """Make every rank's `value` rank 0's, in place."""
    dist.broadcast(value, src=0)
    return value
