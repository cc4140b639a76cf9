"""The bytes that estimate/communication.py derives from shapes are those that torch's process groups are given.

`pytest -s` prints both. Collectives are seen where they go through torch's dispatcher, and counted as rings send them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import bias
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lrc.config import Config
from megatron_lrc.estimate.communication import traffic
from megatron_lrc.estimate.stage import stages_of
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.mcore import distributed
from megatron_lrc.methods import method_of
from megatron_lrc.train import loop
from megatron_lrc.train.start_checks import check
from megatron_lrc.train.step import train_step
from ranks import run_ranks
from runs import make_config, on_layout

pytestmark = pytest.mark.distributed


SENDS = "sends"


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends, by name of the process group; point to point under `SENDS`, since megatron-core uses
    two groups for that."""

    def __init__(self, sharing: dist.ProcessGroup | None) -> None:
        super().__init__()
        self._sharing = sharing
        self.sent: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.__name__.partition(".")[0].strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, args: tuple) -> None:
        (group,) = (
            dist.ProcessGroup.unbox(each)
            for each in args
            if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each._type())
        )
        size, is_first = group.size(), group.rank() == 0
        factors = {
            "allgather_base": (size - 1) / size,
            "allgather_into_tensor_coalesced": (size - 1) / size,
            "reduce_scatter_base": (size - 1) / size,
            "reduce_scatter_tensor_coalesced": (size - 1) / size,
            "allreduce": 2 * (size - 1) / size,
            "allreduce_coalesced": 2 * (size - 1) / size,
            # Of several ranks each but the last in line passes it on. The two ends have one sender.
            "broadcast": 1.0 if group is self._sharing else float(is_first),
            "reduce": 1.0,
            "send": 1.0,
            "recv": 0.0,
        }
        whole = max(tensor.nbytes for tensor in tensors_in(args))  # of what is gathered or scattered
        name = SENDS if operation == "send" else group.group_name
        self.sent[name] += whole * factors[operation]  # KeyError: an operation that is not known here


def tensors_in(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)


def mask_of_late_piece(queries: int, keys: int) -> Tensor:
    """torch's own bias class cannot be made while a dispatch mode looks on."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def measure(config: Config) -> dict[str, float]:
    """On a rank: what it sends in the second step of a run."""
    bias.causal_lower_right = mask_of_late_piece  # type: ignore[assignment] (this process ends soon)
    trainer = loop.Trainer(config, check(config, distributed.world_size()), distributed.start(config))
    batches = trainer._batches(trainer.train_data, 0)
    train_step(trainer.run, batches)
    groups = trainer.groups
    with SentBytes(groups.sharing) as mode:
        train_step(trainer.run, batches)
    named = {"TP": groups.tp, "CP": groups.cp, "DP": groups.dp_cp, "ends": groups.embedding, "node": groups.sharing}
    collectives = {name: mode.sent[group.group_name] if group else 0.0 for name, group in named.items()}
    return {**collectives, "PP": mode.sent[SENDS]}


def predict(config: Config, rank: int, world_size: int) -> dict[str, float]:
    assert config.model.teacher
    teacher = describe_teacher(config.model.teacher).shape
    stages = list(stages_of(config, teacher, method_of(config).student_shape(teacher)))
    place = rank * len(stages) // world_size  # pipeline ranks are the outermost
    sent = traffic(stages[place], world_size=world_size)
    over = {"TP": sent.over_tp, "CP": sent.context, "PP": sent.pipeline, "DP": sent.data, "ends": sent.ends}
    return {**over, "node": sent.composed + sent.composed_gradients}


def no_change(config: Config) -> None:
    pass


def bf16(config: Config) -> None:
    config.training.bf16 = True


def logits(config: Config) -> None:
    config.model.method = "logits"


def fewer_layers(config: Config) -> None:
    config.model.student_layers = ["0", "2-3"]


def reverse(config: Config) -> None:
    config.loss.kl_divergence = "reverse"


def top_k(config: Config) -> None:
    config.loss.kl_top_k = 6


def overlap(config: Config) -> None:
    parallel = config.parallel
    parallel.overlap_grad_reduce = parallel.overlap_param_gather = True
    parallel.ddp_bucket_size = 5000


def share(config: Config) -> None:
    config.parallel.share_compose = True


def share_in_bf16(config: Config) -> None:
    share(config)
    bf16(config)


def recompute_all(config: Config) -> None:
    config.parallel.recompute_granularity = "full"


def recompute_mlp(config: Config) -> None:
    config.parallel.recompute_granularity, config.parallel.recompute_modules = "selective", ["mlp"]


def mean_of_replicas(sent: list[dict[str, float]], layout: dict[str, Any]) -> list[dict[str, float]]:
    """Of ranks of DP 2 as their own replica's and the other's, which owns other matrices."""
    beside = layout.get("tp", 1)
    others = [sent[rank ^ beside] for rank in range(len(sent))]
    return [{name: (one[name] + other[name]) / 2 for name in one} for one, other in zip(sent, others, strict=True)]


@pytest.mark.parametrize(
    "layout, change",
    [
        ({"tp": 2}, no_change),
        ({"tp": 2}, bf16),
        ({"tp": 2}, recompute_all),
        ({"tp": 2}, recompute_mlp),
        ({"tp": 2}, logits),
        ({"tp": 2}, fewer_layers),
        ({"tp": 2}, top_k),
        pytest.param({"tp": 2}, reverse, marks=pytest.mark.slow),
        ({"pp": 2}, logits),
        ({"dp": 2, "dist_opt": True}, logits),
        ({"pp": 2}, no_change),
        ({"pp": 2, "chunks": 2}, bf16),
        ({"cp": 2}, no_change),
        ({"dp": 2}, no_change),
        ({"dp": 2, "dist_opt": True}, bf16),
        ({"dp": 2, "dist_opt": True}, overlap),
        ({"dp": 2}, share_in_bf16),
        pytest.param({"tp": 2, "pp": 2}, no_change, marks=pytest.mark.slow),
        pytest.param({"cp": 2, "pp": 2}, fewer_layers, marks=pytest.mark.slow),
        pytest.param({"tp": 2, "dp": 2, "dist_opt": True}, no_change, marks=pytest.mark.slow),
        pytest.param({"cp": 2, "pp": 2, "chunks": 2}, no_change, marks=pytest.mark.slow),
        pytest.param({"tp": 2, "dp": 2}, share, marks=pytest.mark.slow),
        pytest.param({"cp": 2, "pp": 2, "chunks": 2}, share, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "is_tied", [pytest.param(True, id="tied"), pytest.param(False, id="untied", marks=pytest.mark.slow)]
)
def test_every_rank_sends_what_is_predicted(
    tiny_llama, tiny_text, tmp_path, layout: dict[str, Any], change: Callable[[Config], None], is_tied: bool
):
    world_size = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1) * layout.get("dp", 1)
    teacher = tiny_llama(is_tied=is_tied, num_layers=4)
    on = {name: value for name, value in layout.items() if name != "dp"}
    config = on_layout(make_config(teacher, tiny_text, tmp_path, steps=2), **on)
    config.checkpoint.save = None
    change(config)
    resolved = config.resolved(world_size)
    sent = run_ranks(world_size, measure, resolved)
    if config.parallel.share_compose and "dp" in layout:
        sent = mean_of_replicas(sent, layout)
    for rank, measured in enumerate(sent):
        predicted = predict(resolved, rank, world_size)
        for name, volume in measured.items():
            if volume or predicted[name]:
                case = f"{layout} {change.__name__} rank {rank}"
                print(f"{case} {name}: {predicted[name]:,.0f} bytes predicted, {volume:,.0f} sent")
            # megatron-core rounds gradient buffers up, to be divided into equal parts.
            assert volume == pytest.approx(predicted[name], rel=0.03 if "dist_opt" in layout else 1e-9), (rank, name)
