"""What trains: megatron-core's DDP and optimizers round a stage's trained module, and the learning-rate schedule.

Gradients come in as sums over tokens and are divided once, by the global token count. The order: pull back (done);
sum what is replicated over TP, and what is tied over the embedding group; data-parallel sum; divide by the tokens;
clip; step. With --overlap-grad-reduce the data-parallel sum comes first, a bucket at a time as gradients are
complete, during the last backward pass: as autograd leaves them, and those of projections as they are pulled back.

With --overlap-param-gather the step leaves each rank with its own part of the new parameters, and the others'
parts on their way: whoever reads a parameter then awaits it, or all of them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_lrc.config import Config
from megatron_lrc.mcore import compat
from megatron_lrc.mcore.distributed import Groups
from megatron_lrc.mcore.moments import copy_state, start_second_moments
from megatron_lrc.mcore.overlap import BucketOverlap
from megatron_lrc.mcore.stages import PipelineStage


def build_optimizer(config: Config, stages: Sequence[PipelineStage], groups: Groups) -> "StageOptimizer":
    """The optimizer of these stages, attached to them."""
    for stage in stages:
        mark_for_grad_norm(stage)
    optimizer = StageOptimizer(config, stages, groups)
    optimizer.attach(stages)
    return optimizer


class StageOptimizer:
    """AdamW on everything that this rank's stages train. `build_optimizer` makes it ready for use."""

    def __init__(self, config: Config, stages: Sequence[PipelineStage], groups: Groups):
        self.groups = groups
        self.clip_grad, self._beta2 = config.optimizer.clip_grad, config.optimizer.adam_beta2
        self._vocab_size = stages[0].shapes.student.vocab_size
        everything = self._trained = [trained for stage in stages for trained in stage.trained()]
        self._tied = [trained.parameter for trained in everything if trained.is_at_both_ends]
        self._replicated = [trained.parameter for trained in everything if trained.split is None]
        self.replicas = [self._data_parallel(config, stage) for stage in stages]
        self._is_overlapped = config.parallel.overlap_grad_reduce
        self._is_gather_overlapped = config.parallel.overlap_param_gather
        optimizer_config = _optimizer_config(config)
        self.optimizer = get_megatron_optimizer(
            optimizer_config,
            self.replicas,
            config_overrides=get_standard_config_overrides(optimizer_config),  # no weight decay of the gains
        )
        compat.find_saved_state_in_every_bucket(self.optimizer)
        self._training = config.training
        #: Something is trained from the middle of the run on, and no step has been taken with it yet.
        self.is_to_start_moments = False
        self.lr_schedule = _lr_schedule(config, self.optimizer)
        self.initialize_state()

    def attach(self, stages: Sequence[PipelineStage]) -> None:
        """Tell the stages that this optimizer trains them: how their communication overlaps, and, in the
        configuration that the schedules and the losses read, what holds back the sums until a step's last
        backward pass and what scales the loss."""
        if self._is_overlapped:
            no_sync = [replica.no_sync for replica in self.replicas]
            stages[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        for stage, replica in zip(stages, self.replicas, strict=True):
            if self._training.fp16:
                stage.config.grad_scale_func = self.optimizer.scale_loss
            stage.attach(BucketOverlap(replica, has_pipeline=self.groups.pp.size() > 1))

    @staticmethod
    def _data_parallel(config: Config, stage: PipelineStage) -> DistributedDataParallel:
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=config.training.bf16 or config.training.fp16,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            overlap_grad_reduce=config.parallel.overlap_grad_reduce,
            overlap_param_gather=config.parallel.overlap_param_gather,
            align_param_gather=True,  # nobody but `clip_and_step` begins a gather
            bucket_size=config.parallel.ddp_bucket_size,
        )
        return DistributedDataParallel(stage.config, ddp_config, stage.trained_module)

    @torch.no_grad()
    def initialize_state(self) -> None:
        """Allocate Adam's state now: it is lazy, and a checkpoint of the untrained state would lack it."""
        for inner in compat.inner_optimizers(self.optimizer):
            for group in inner.param_groups:
                for parameter in group["params"]:
                    state = inner.state[parameter]
                    if state:
                        continue
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                    if isinstance(inner, compat.TORCH_ADAM):  # TE's and apex's count steps per group
                        state["step"] = torch.zeros((), dtype=torch.float32)

    def load_state_dict(self, optimizer_state: dict, *, num_updates: int) -> None:
        """Take over loaded moments, main parameters and step count. Rates and decays stay as the flags say.

        num_updates: optimizer steps taken so far; the learning rate is a function of it and the flags alone.
        """
        compat.load_optimizer_state(self.optimizer, optimizer_state, num_updates=num_updates)
        self.lr_schedule.num_steps = num_updates
        self.lr_schedule.step(0)

    def stepped(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """What this rank steps: a parameter's name, the part of it that is stepped, and that part in the optimizer,
        both flat and the tensors themselves. In fp32 they may be one tensor."""
        for trained in self._trained:
            if (found := compat.state_of(self.optimizer, trained.parameter)) is not None:
                part, state = found
                yield f"{trained.name} ({trained.key})", trained.parameter.detach().view(-1)[part], state["param"]

    def take_over(self, before: "StageOptimizer", *, with_moments: bool = True) -> None:
        """Go on from an optimizer of the same stages as they were before some of their matrices became their
        own: its count of steps and loss scale, and the moments of what is still trained. Collective over data
        parallel ranks.

        with_moments: False where nothing that was trained is trained any more.
        """
        old = {(trained.name, trained.key): trained for trained in before._trained if with_moments}
        for trained in self._trained:
            if (same := old.get((trained.name, trained.key))) is not None:
                group = self.groups.dp_cp
                copy_state(before.optimizer, same.parameter, self.optimizer, trained.parameter, group)
        for inner in compat.inner_optimizers(self.optimizer):
            compat.set_step(inner, before.lr_schedule.num_steps)
        self.lr_schedule.num_steps = before.lr_schedule.num_steps
        self.lr_schedule.step(0)
        self.is_to_start_moments = True
        if (scaler := getattr(before.optimizer, "grad_scaler", None)) is not None:
            self.optimizer.grad_scaler.load_state_dict(scaler.state_dict())

    @property
    def kind(self) -> str:
        """Whose Adam takes the steps: megatron-core takes the first of three that it can import."""
        inner = next(iter(compat.inner_optimizers(self.optimizer)), None)
        if inner is None:  # a stage without anything to train
            return "no optimizer"
        package = type(inner).__module__.partition(".")[0]
        owner = "Transformer Engine" if package == "transformer_engine" else package
        return f"{owner}'s {type(inner).__name__}"

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def loss_scale(self) -> float:
        """What the losses are multiplied by before backward: above 1 with fp16 only."""
        return float(self.optimizer.get_loss_scale()) if self._training.fp16 else 1.0  # reads the device

    def can_be_lowered(self, loss_scale: float) -> bool:
        """Whether gradients that overflow at it are part of the search for the loss scale, and no fault."""
        is_dynamic = self._training.fp16 and self._training.loss_scale is None
        return is_dynamic and self._training.min_loss_scale < loss_scale

    def zero_grad(self) -> None:
        for replica in self.replicas:
            replica.zero_grad_buffer()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def reduce_gradients(self, num_tokens: Tensor) -> None:
        """Make each gradient the mean over the global batch's `num_tokens` (a tensor: the host does not wait).

        The sums may come in either order; those begun already are waited for before anything else is added.
        """
        if self._is_overlapped:
            for replica in self.replicas:
                replica.finish_grad_sync()
        if self.groups.tp.size() > 1 and self._replicated:
            # With sequence parallelism each rank saw its own tokens; gains of q and k meet own heads only.
            _sum_together([parameter.main_grad for parameter in self._replicated], self.groups.tp)
        if self.groups.pp.size() > 1 and self.groups.embedding is not None:
            for matrix in self._tied:
                dist.all_reduce(matrix.main_grad, group=self.groups.embedding)
        scale = num_tokens.clamp_min(1).reciprocal()
        for replica in self.replicas:
            if not self._is_overlapped:
                replica.finish_grad_sync()
            replica.scale_gradients(scale)

    @torch.no_grad()
    def clip_and_step(self, *, may_step: bool = True, max_norm: float = math.inf) -> tuple[bool, float]:
        """(whether anything was updated, the gradient norm before clipping). All ranks skip if it is not finite.

        may_step: False if the losses already forbid it; the same on every rank, as max_norm is, above which
        no step is taken. A dynamic loss scale changes here.
        """
        found_inf = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not may_step or found_inf or not math.isfinite(grad_norm) or grad_norm > max_norm:
            return False, grad_norm
        if self.clip_grad > 0:
            clip_grad_by_total_norm_fp32(self.optimizer.get_parameters(), self.clip_grad, grad_norm)
        if self.is_to_start_moments:
            start_second_moments(
                self.optimizer,
                self._trained,
                self.groups,
                num_updates=self.lr_schedule.num_steps,
                beta2=self._beta2,
                vocab_size=self._vocab_size,
            )
            self.is_to_start_moments = False
        is_updated = self.optimizer.step_with_ready_grads()
        if self._is_gather_overlapped:
            for group in self._bucket_groups():
                group.start_param_sync()
        self._equalize_tied()
        return is_updated, grad_norm

    def await_parameters(self) -> None:
        """Have all parameters whole: between steps, before anything but a stage reads them."""
        if self._is_gather_overlapped:
            for group in self._bucket_groups():
                group.finish_param_sync(skip_next_bucket_dispatch=True)

    def _bucket_groups(self) -> Iterator[Any]:
        """In the order of the forward pass; DDP fills its buckets from the last parameter to the first."""
        return (group for replica in self.replicas for group in reversed(replica.bucket_groups))

    def _equalize_tied(self) -> None:
        """Give the last stage what is tied to the first one's. Both have taken the same step, but the sums
        over their data parallel groups need not have been added up in the same order."""
        group = self.groups.embedding
        if self.groups.pp.size() > 1 and group is not None:
            for matrix in self._tied:
                dist.broadcast(matrix, src=dist.get_process_group_ranks(group)[0], group=group)


def mark_for_grad_norm(stage: PipelineStage) -> None:
    """Tell megatron-core's gradient norm what to count: every TP rank's shards; what is tied once. It copies
    these marks to the optimizer's fp32 parameters when it makes them, so this comes first."""
    for trained in stage.trained():
        if trained.split is not None:
            trained.parameter.tensor_model_parallel = True
            trained.parameter.partition_dim, trained.parameter.partition_stride = trained.split, 1
        if trained.is_at_both_ends and not stage.pre_process:
            trained.parameter.shared = True


def _sum_together(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """All-reduce several small tensors as one."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def parameter_dtype(config: Config) -> torch.dtype:
    if config.training.fp16:
        return torch.float16
    return torch.bfloat16 if config.training.bf16 else torch.float32


#: Settings that go by the same names in megatron-core's OptimizerConfig.
_OF_OPTIMIZER = ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
_OF_LOSS_SCALE = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")


def _optimizer_config(config: Config) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        params_dtype=parameter_dtype(config),
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        **{name: getattr(config.optimizer, name) for name in _OF_OPTIMIZER},
        **{name: getattr(config.training, name) for name in ("bf16", "fp16", *_OF_LOSS_SCALE)},
    )


def _lr_schedule(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warmup, then the decay; its clock is optimizer steps."""
    settings, decay_iters = config.optimizer, max(config.decay_iters, 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.peak_lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=min(config.warmup_iters, decay_iters - 1),
        lr_decay_steps=decay_iters,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=decay_iters,
        wd_incr_style="constant",
        wsd_decay_steps=config.wsd_decay_iters,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )
