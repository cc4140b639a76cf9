"""`Config`: everything a run is made from, and what follows from it. Also the two errors that users get to read.

The sections of settings are in `settings/`; here are the sizes that follow from them (data-parallel size,
warmup steps). What follows from --method is asked of its `Method` (`megatron_lrc.methods`).
`validation.validate()` reports every impossible combination that can be seen without the teacher,
`validation.validate_against_teacher()` the rest; both run before any process group or model exists, and give
the same answer on every rank. Nothing here imports torch: `--help` answers at once.
"""

from collections.abc import Collection
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from .budget import count_steps, is_counted
from .layer_map import parse_layers
from .model_role import STUDENT, TEACHER, ModelRole
from .rates import choose_rates
from .schedule import warmup_iters, wsd_decay_iters
from .settings import (
    CLONE_TERMS,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ProjectionConfig,
    PruningConfig,
    TrainingConfig,
)

#: Every cloned matrix: those of a layer, and the two ends.
MATRICES = (*CLONE_TERMS, "embed", "lm_head")


class ConfigError(ValueError):
    """What the user asked for cannot be done. The message says what was wrong, what was expected and what to do."""


class RunStopped(RuntimeError):
    """A run ended itself: going on would be of no use. The message says why and what to do."""


class RunFailed(RuntimeError):
    """A run had to end, and may go on from its last checkpoint. The message says why and what to do."""


def flag_of(name: str) -> str:
    """The command-line spelling of a field, which is also how messages name it."""
    return "--" + name.replace("_", "-")


def parse_clone_term(text: str) -> tuple[str, list[range] | None]:
    """`gate:0-3,7` -> (`gate`, [range(0, 4), range(7, 8)]); without layers None. ValueError if it is no such text."""
    term, colon, layers = text.partition(":")
    if term not in CLONE_TERMS:
        raise ValueError(f"{term!r} is none of {' '.join(CLONE_TERMS)}")
    if not colon:
        return term, None
    return term, parse_layers(layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The shape of one decoder-only transformer, teacher or student. Sizes in elements, from a Hugging Face config.

    teacher_layers: of a student that has not all of its teacher's layers, which ones (from 0) its own are made of and
    compared with (`layer_map`); () stands for all of them, in a model that has no teacher too.
    windowed_layers: those whose queries meet only the last `sliding_window` keys, their own among them.
    unrotated_layers: those without RoPE. Of a student with `teacher_layers` both are the teacher's layers: ask
    `window` and `is_rotated`.
    embedding_multiplier, residual_multiplier: of embeddings, and of what a block adds to the residual stream.
    attention_multiplier: of the scores of queries and keys; None: 1 / sqrt(head_dim). logits_scaling: divides logits.
    scales_embeddings: embeddings are multiplied by sqrt(hidden_size), rounded to the weights' dtype; each model by its
    own. attention_soft_cap, logits_soft_cap: c of c tanh(x / c), of attention's scores and of logits; 0: none.
    norms: those of a layer, of LAYER_NORMS. has_zero_centered_norms: a norm's stored gain w multiplies by 1 + w.
    has_wide_qk_norm: q and k are normed over all heads together, with gains of all their features; has_qk_norm: over
    each head, with gains over head_dim. activation: of the gate, "silu" or "gelu" (its tanh form).
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    norm_epsilon: float
    is_tied: bool
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    max_position_embeddings: int = 0
    teacher_layers: tuple[int, ...] = ()
    sliding_window: int = 0
    windowed_layers: tuple[int, ...] = ()
    unrotated_layers: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    scales_embeddings: bool = False
    attention_soft_cap: float = 0.0
    logits_soft_cap: float = 0.0
    norms: tuple[str, ...] = ("input", "post")
    has_zero_centered_norms: bool = False
    has_wide_qk_norm: bool = False
    activation: Literal["silu", "gelu"] = "silu"

    def __post_init__(self) -> None:
        for name in ("teacher_layers", "windowed_layers", "unrotated_layers", "norms"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON knows lists only

    @property
    def gain_offset(self) -> float:
        """What a norm adds to its stored gain."""
        return 1.0 if self.has_zero_centered_norms else 0.0

    @property
    def has_norms_after(self) -> bool:
        """Whether what blocks give is normed before it is added to the residual stream."""
        return "after_mlp" in self.norms

    def window(self, layer: int) -> int | None:
        """How many keys a query of one of its own layers (from 0) meets at most, itself among them; None: all."""
        return self.sliding_window if self.teacher_layer(layer) in self.windowed_layers else None

    def is_rotated(self, layer: int) -> bool:
        """Whether one of its own layers (from 0) has RoPE."""
        return self.teacher_layer(layer) not in self.unrotated_layers

    def without_teacher(self) -> "ModelShape":
        """The same model, its layers no longer made of others."""
        layers = range(self.num_layers)
        return replace(
            self,
            teacher_layers=(),
            windowed_layers=tuple(layer for layer in layers if self.window(layer) is not None),
            unrotated_layers=tuple(layer for layer in layers if not self.is_rotated(layer)),
        )

    def teacher_layer(self, layer: int) -> int:
        """The layer of its teacher that one of its own is made of and compared with; both from 0."""
        return self.teacher_layers[layer] if self.teacher_layers else layer

    def teacher_name(self, name: str) -> str:
        """The same of a name: layers.1.q -> layers.3.q; `embed`, `final` and `lm_head` stay."""
        prefix, _, rest = name.partition(".")
        layer, _, part = rest.partition(".")
        return f"{prefix}.{self.teacher_layer(int(layer))}.{part}" if part else name

    def layers_among(self, teacher_layers: Collection[int]) -> tuple[int, ...]:
        """Its own layers that are made of these of its teacher's, as a pipeline stage holds them together."""
        return tuple(layer for layer in range(self.num_layers) if self.teacher_layer(layer) in teacher_layers)


@dataclass(kw_only=True, slots=True)
class Config:
    """Everything a run is made from. Sections group the flags in --help; flag names are unique across sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def train_iters(self) -> int:
        """Steps of the whole run, whatever its budget: --train-tokens and --train-samples are counted by `resolved`,
        --train-epochs with the data at hand (`data.datasets.resolve_train_iters`)."""
        assert self.training.train_iters is not None, "the budget has been counted in steps"
        return self.training.train_iters

    @property
    def decay_iters(self) -> int:
        """Steps over which the learning rate decays, warmup included."""
        return self.train_iters if self.optimizer.lr_decay_iters is None else self.optimizer.lr_decay_iters

    @property
    def warmup_iters(self) -> int:
        """Steps of linear warmup (`schedule.warmup_iters`)."""
        return warmup_iters(self.optimizer, self.decay_iters)

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warmup; of --lr auto known in a configuration that is `resolved`."""
        assert self.optimizer.lr is not None, "the configuration has been resolved"
        return self.optimizer.lr

    @property
    def wsd_decay_iters(self) -> int:
        """Steps in which the rate falls, with --lr-decay-style WSD."""
        return wsd_decay_iters(self.optimizer, self.decay_iters)

    def batch_tokens(self, world_size: int) -> int:
        """Tokens per optimizer step over all replicas."""
        return self.global_batch_size(world_size) * self.training.seq_length

    @property
    def calibrations(self) -> tuple[str, ...]:
        """Flags for which a new run first runs training tokens through the teacher."""
        kept = ("student_num_query_groups", "student_ffn_hidden_size") if self.model.method == "lrc" else ()
        return (
            *(f"{flag_of(name)} {size}" for name in kept if (size := getattr(self.model, name)) is not None),
            *([f"--init {self.projection.init}"] if self.projection.is_calibrated else []),
            *([f"--clone-normalization {self.loss.clone_normalization}"] if self.loss.is_relative else []),
        )

    @property
    def num_chunks(self) -> int:
        """Model chunks (virtual stages) on each pipeline rank."""
        return self.parallel.num_virtual_stages_per_pipeline_rank or 1

    def step_of(self, after: float) -> int:
        """A number of steps, or below 1 a fraction of all, in steps."""
        return int(after) if after >= 1 else int(after * self.train_iters + 0.5)

    @property
    def base_model(self) -> str | None:
        """The directory whose config.json and tokenizer the student has."""
        return self.model.teacher if self.model.student is None else self.model.student

    @property
    def base_role(self) -> ModelRole:
        """How errors name `base_model`."""
        return TEACHER if self.model.student is None else STUDENT

    @property
    def total_kl_weight(self) -> float:
        """What tau^2 * KL, mean over tokens, is multiplied by: --kl-weight, converted by --kl-reduction."""
        loss = self.loss
        if loss.kl_reduction == "sequence-sum":
            return loss.kl_weight * self.training.seq_length / loss.kl_temperature**2
        return loss.kl_weight

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of both models (DP): what tensor, pipeline and context parallelism leave over."""
        return world_size // self.model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Processes that work on the same sequences: TP times PP times CP."""
        parallel = self.parallel
        return (
            parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
        )

    def global_batch_size(self, world_size: int) -> int:
        """Sequences per optimizer step over all replicas."""
        if self.training.global_batch_size is not None:
            return self.training.global_batch_size
        return self.training.micro_batch_size * self.data_parallel_size(world_size)

    def resolved(self, world_size: int) -> "Config":
        """A copy that leaves nothing to the number of processes: what is trained with, printed and saved. A budget in
        tokens or sequences has become steps, for a run that starts; --lr auto a number."""
        config = deepcopy(self)
        config.training.global_batch_size = self.global_batch_size(world_size)
        choose_rates(config.projection, config.optimizer, self.batch_tokens(world_size))
        if (steps := count_steps(config.training)) is not None:
            config.training.train_iters = steps
        return config

    def describe_layout(self, world_size: int, devices: str) -> str:
        """One line: how the models lie on the devices, and what a step takes. devices: "8 GPUs", "cpu"."""
        parallel, training = self.parallel, self.training
        cp = f" x CP {parallel.context_parallel_size}" if parallel.context_parallel_size > 1 else ""
        shards = " with sequence parallel" if parallel.tensor_model_parallel_size > 1 else ""
        return (
            f"TP {parallel.tensor_model_parallel_size}{shards} x PP {parallel.pipeline_model_parallel_size}{cp} x DP "
            f"{self.data_parallel_size(world_size)} on {devices}; {self.num_microbatches(world_size)} micro-batches of "
            f"{training.micro_batch_size} x {training.seq_length} tokens per step"
        )

    def num_microbatches(self, world_size: int) -> int:
        """Forward passes of one replica per optimizer step (gradient accumulation)."""
        sequences_at_once = self.training.micro_batch_size * self.data_parallel_size(world_size)
        return self.global_batch_size(world_size) // sequences_at_once

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values (section -> field -> value), for YAML and JSON.

        Steps counted from another budget are left out: read back, they are counted again, for the batch size of then.
        """
        values = asdict(self)
        if is_counted(self.training):
            values["training"]["train_iters"] = None
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`; sections and fields that are missing keep their defaults."""
        sections: dict[str, Any] = {section.name: section.default_factory for section in fields(cls)}
        return cls(**{name: sections[name](**section) for name, section in values.items()})
