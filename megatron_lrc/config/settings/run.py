"""How it is trained: layout, kernels, optimizer, budget, data, checkpoints and reports. See the package's docstring."""

from dataclasses import dataclass
from typing import Literal

from .setting import setting


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How one model is laid out over processes; what is left over is data parallel."""

    tensor_model_parallel_size: int = setting(
        1, "Processes (TP) that share each layer's matrices. Above 1 it comes with --sequence-parallel.", at_least=1
    )
    pipeline_model_parallel_size: int = setting(1, "Pipeline stages (PP).", at_least=1)
    num_virtual_stages_per_pipeline_rank: int | None = setting(
        None, "Model chunks on each pipeline rank: above 1 the interleaved schedule. Default: 1F1B.", at_least=2
    )
    context_parallel_size: int = setting(
        1, "Processes (CP) that divide each sequence; every layer gathers its keys and values.", at_least=1
    )
    sequence_parallel: bool | None = setting(
        None,
        "Shard norms and residual stream over the sequence among the TP processes. Default: with TP above 1, which "
        "does not go without.",
    )
    decoder_first_pipeline_num_layers: int | None = setting(
        None, "Layers on the first pipeline stage. Default: an even split.", at_least=1
    )
    decoder_last_pipeline_num_layers: int | None = setting(
        None, "Layers on the last pipeline stage. Default: an even split.", at_least=1
    )
    pipeline_model_parallel_layout: str | None = setting(
        None,
        "Every stage by hand: E embedding, t layer, L losses, | next stage, (...)*N and t*N repeat: Et*3|(tt|)*2tL. "
        "Default: an even split.",
        metavar="LAYOUT",
    )
    account_for_embedding_in_pipeline_split: bool = setting(
        False, "Count the embedding as one layer when layers are divided over stages."
    )
    account_for_loss_in_pipeline_split: bool = setting(
        False, "Count the LM heads and losses as one layer when layers are divided over stages."
    )
    recompute_granularity: Literal["full", "selective"] | None = setting(
        None, "Recompute activations in backward. full: whole layers; selective: --recompute-modules. Default: none."
    )
    recompute_method: Literal["uniform", "block"] = setting(
        "uniform",
        "With full. uniform: all layers, in groups of --recompute-num-layers; block: that many layers of each stage.",
    )
    recompute_num_layers: int = setting(1, "See --recompute-method.", at_least=1)
    recompute_modules: list[str] = setting(["core_attn"], "With selective: core_attn, mlp or both.", metavar="MODULE")
    use_distributed_optimizer: bool = setting(False, "Shard optimizer state over the data-parallel processes.")
    overlap_grad_reduce: bool = setting(
        False,
        "Sum gradients over the data-parallel processes, a bucket at a time, while a step's last backward pass still "
        "computes others; projections are pulled back during it.",
    )
    overlap_param_gather: bool = setting(
        False,
        "With --use-distributed-optimizer and --overlap-grad-reduce: collect what each data-parallel process has "
        "updated, a bucket at a time, when the next step has begun: beside the teacher's first pass if there are no "
        "pipeline stages, then beside composing the student (with --method ordinary, beside the first forward pass).",
    )
    share_compose: bool = setting(
        False,
        "With --method lrc: the data and context parallel replicas of a node divide compose and pull back among "
        "themselves, a matrix of the student each, and exchange matrices and their gradients instead, which takes "
        "NVLink. Matrices travel beside the teacher's first pass; gradients, with --overlap-grad-reduce, beside the "
        "last backward pass. Not yet run on a GPU.",
    )
    tp_comm_overlap: bool = setting(
        False,
        "Exchange what the student's linear layers need of other tensor parallel ranks, or give to them, while their "
        "matrix products run (Transformer Engine's userbuffers, which need NVLink; half precision, no FP8). The "
        "teacher's exchanges stay as they are: the buffers are of one hidden size. Not yet run on a GPU.",
    )
    ddp_bucket_size: int | None = setting(
        None,
        "Elements of a bucket that --overlap-grad-reduce sums at once, about. Default: megatron-core's, 40 million or "
        "a million per data-parallel process, whichever is more.",
        at_least=1,
    )
    distributed_timeout_minutes: float = setting(
        10.0,
        "Minutes (0.5 is half a minute) a collective may wait for a rank that does not come before the run ends. It "
        "has to outlast what one rank does alone, such as building the data's index maps.",
        above=0,
    )

    @property
    def is_sequence_parallel(self) -> bool:
        """--sequence-parallel, or what it is by default."""
        return self.tensor_model_parallel_size > 1 if self.sequence_parallel is None else self.sequence_parallel


@dataclass(kw_only=True, slots=True)
class ComputeConfig:
    """Which kernels compute the layers, and FP8. On CPU nothing here applies but its defaults."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = setting(
        "auto",
        "Layers of NVIDIA's Transformer Engine, or of megatron-core alone. auto: transformer_engine where it is "
        "installed, on a GPU with --bf16 or --fp16 (its products of fp32 are TF32); else local.",
    )
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = setting(
        "auto",
        "flash, fused, unfused: Transformer Engine's attention, by FlashAttention, cuDNN or plain matrix products; "
        "local: torch's. auto: what Transformer Engine chooses, but local without it, in fp32, with "
        "--reset-attention-mask and with --context-parallel-size.",
    )
    gradient_accumulation_fusion: bool = setting(
        True,
        "With Transformer Engine and --bf16 or --fp16, its weight-gradient products add to the fp32 gradients "
        "themselves.",
    )
    deterministic_mode: bool = setting(
        False,
        "On a GPU choose kernels that give the same result to the last digit each time, so that a continued run equals "
        "one that was not stopped. Slower. With several GPUs set NCCL_ALGO too. (On CPU results repeat anyway.)",
    )
    fp8_format: Literal["e4m3", "hybrid"] | None = setting(
        None,
        "The matrix products of the student's layers in FP8: e4m3 throughout, or hybrid, with e5m2 for gradients. LM "
        "head, losses, projections and attention stay as they are. Needs --bf16, Transformer Engine and a GPU of "
        "capability 8.9. Default: no FP8.",
    )
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8", "delayed"] = setting(
        "tensorwise",
        "How FP8 is scaled. tensorwise: by tensor, from its present values; blockwise: by 128 x 128 values of weights, "
        "128 of others (capability 9.0); mxfp8: by 32 (capability 10.0); delayed: by tensor, from past values.",
    )
    fp8_amax_history_len: int = setting(1, "With delayed: how many past maxima count.", at_least=1)
    fp8_amax_compute_algo: Literal["most_recent", "max"] = setting(
        "most_recent", "With delayed: which of the past maxima gives the scale."
    )
    teacher_fp8: bool = setting(
        False,
        "The teacher's layers in FP8 too, its weights quantised once for the run. Its --bf16 weights are kept, since "
        "the student is composed from them: FP8 saves time, and costs a byte per weight.",
    )
    first_last_layers_bf16: bool = setting(
        False, "Leave the first and last layers out of FP8: --num-layers-at-start-in-bf16, --num-layers-at-end-in-bf16."
    )
    num_layers_at_start_in_bf16: int = setting(1, "With --first-last-layers-bf16.", at_least=0)
    num_layers_at_end_in_bf16: int = setting(1, "With --first-last-layers-bf16.", at_least=0)


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW on the projections and norm gains, and the learning-rate schedule."""

    lr: float | None = setting(
        1e-4,
        "Peak learning rate. auto: by how the projections start and by the tokens of a step, a rule that is in "
        "docs/runs.md; printed at the start, saved as a number, and kept where the run is continued. For --method lrc.",
        at_least=0,
        metavar="X|auto",
        is_auto_if_none=True,
    )
    min_lr: float = setting(0.0, "Learning rate at the end of the decay.", at_least=0)
    lr_decay_style: Literal["linear", "cosine", "constant", "WSD"] = setting(
        "linear",
        "Shape of the decay after the warmup. WSD: the rate is held, and decays over the last steps only "
        "(--lr-wsd-decay-iters).",
    )
    lr_decay_iters: int | None = setting(None, "Steps over which the rate decays. Default: all.", at_least=1)
    lr_wsd_decay_iters: int | None = setting(
        None,
        "With --lr-decay-style WSD: the last so many of the decay steps lower the rate. It stays at that number where "
        "a run goes on with a larger budget, at whose end the decay then is. 0: held to the end.",
        at_least=0,
    )
    lr_wsd_decay_fraction: float | None = setting(
        None,
        "The same as a fraction of the decay steps. Default 0.2 without --lr-wsd-decay-iters.",
        above=0,
        below=1,
    )
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = setting(
        "exponential",
        "Shape of the decay of WSD, over x from 0 to 1: exponential 2 * 0.5^x - 1, linear 1 - x, cosine a half wave, "
        "minus_sqrt 1 - sqrt(x).",
    )
    lr_warmup_fraction: float | None = setting(
        None,
        "Warmup, as a fraction of the decay steps. Default without --lr-warmup-iters: 0.005 of them, but at least 10 "
        "steps or, in runs of less than 50, a fifth: at the full rate the first steps can destroy a closed-form start. "
        "As in the released code, without that minimum: 0.005.",
        at_least=0,
        below=1,
    )
    lr_warmup_iters: int | None = setting(None, "Warmup in steps, instead of --lr-warmup-fraction.", at_least=0)
    weight_decay: float = setting(0.0, "AdamW weight decay of the projections; norm gains have none.", at_least=0)
    adam_beta1: float = setting(0.9, "Adam's first-moment decay.", at_least=0, below=1)
    adam_beta2: float = setting(0.999, "Adam's second-moment decay.", at_least=0, below=1)
    adam_eps: float = setting(1e-8, "Adam's epsilon.", above=0)
    clip_grad: float = setting(
        1.0, "Largest gradient norm, over all projections and norm gains; 0 turns clipping off.", at_least=0
    )


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """Batch, length and precision."""

    micro_batch_size: int = setting(1, "Sequences per forward pass on one data-parallel replica.", at_least=1)
    global_batch_size: int | None = setting(
        None, "Sequences per optimizer step. Default: --micro-batch-size times DP.", at_least=1
    )
    seq_length: int = setting(2048, "Tokens per sequence.", at_least=1)
    train_tokens: int | None = setting(
        None,
        "The run's budget in tokens, such as 500M, 10B or 1.5e9 (K, M, B, T: thousand to trillion): as few steps as "
        "reach it. A run has one budget, this one or one of the next three; one given by a flag replaces that of a "
        "file, which replaces that of a preset.",
        at_least=1,
        metavar="TOKENS",
        takes_suffix=True,
    )
    train_samples: int | None = setting(
        None, "The budget in sequences: as few steps as reach it.", at_least=1, takes_suffix=True
    )
    train_iters: int | None = setting(
        None, "The budget in optimizer steps; 0 with --save writes the untrained student.", at_least=0
    )
    train_epochs: int = setting(
        0, "The budget in whole passes over all the training data, which has no weights then; 0: none.", at_least=0
    )
    bf16: bool = setting(False, "Parameters and activations in bfloat16; gradients and optimizer state stay fp32.")
    fp16: bool = setting(
        False, "Parameters and activations in float16, the loss scaled; gradients and optimizer state stay fp32."
    )
    loss_scale: float | None = setting(
        None, "With --fp16: a fixed loss scale. Default: found while training, from --initial-loss-scale down.", above=0
    )
    initial_loss_scale: float = setting(2.0**32, "Where the search for the loss scale begins.", above=0)
    min_loss_scale: float = setting(1.0, "The smallest loss scale to try.", above=0)
    loss_scale_window: int = setting(1000, "Steps without overflow after which the loss scale doubles.", at_least=1)
    hysteresis: int = setting(2, "Overflows before the loss scale is halved.", at_least=1)
    max_skipped_steps: int = setting(
        10,
        "Stop after this many steps in a row were skipped: their loss or gradient not finite, or a spike.",
        at_least=1,
    )
    exit_interval: int | None = setting(
        None, "Save and stop after a step that this divides. Default: run to the end of the budget.", at_least=1
    )
    exit_duration_in_mins: float | None = setting(
        None,
        "Save and stop after the step that ends these minutes, counted from the start. Default: no limit. Ctrl-C, "
        "SIGTERM, SIGHUP, SIGUSR1 and a file named stop in --save do the same at any time.",
        above=0,
    )
    spike_factor: float | None = setting(
        None,
        "Skip a step whose gradient norm is above this many times the running mean. Default: only clipped.",
        above=1,
    )
    seed: int = setting(1234, "Seed of initialisation and data order.", at_least=0, below=2**32)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Indexed datasets written by tools/preprocess_data.py."""

    data_path: list[str] = setting(
        [],
        "Dataset prefixes, optionally weighted: PREFIX, or W1 PREFIX1 W2 PREFIX2 ...; divided by --split.",
        metavar="PREFIX",
        per_rank="path",
    )
    split: str = setting("969,30,1", "Train, validation and test parts of --data-path.", metavar="TRAIN,VALID,TEST")
    train_data_path: list[str] = setting(
        [], "Training prefixes, instead of --data-path; same form.", metavar="PREFIX", per_rank="path"
    )
    valid_data_path: list[str] = setting(
        [], "Validation prefixes, beside --train-data-path; same form.", metavar="PREFIX", per_rank="path"
    )
    data_cache_path: str | None = setting(
        None, "Folder for the dataset's index maps. Default: cache/ beside the data.", metavar="DIR", per_rank="path"
    )
    tokenizer_model: str | None = setting(
        None, "Tokenizer directory. Default: --teacher, or --student.", metavar="DIR", per_rank="path"
    )
    eod_mask_loss: bool = setting(False, "Leave the end-of-document tokens out of every loss.")
    train_on_inputs: bool = setting(
        False,
        "Count every token of chats in the losses. Default: only the assistant's, where the dataset says which these "
        "are (PREFIX.mask, which preprocess_data.py writes of chats).",
    )
    mask_last_label: bool = setting(
        False,
        "Leave each sample's last label out of every loss: the first token after the sample, which is of another chunk "
        "where the data are chunks of --seq-length tokens (--token-ids).",
    )
    reset_attention_mask: bool = setting(
        False, "Let a token attend to its own document only, which ends with the end-of-document token."
    )
    reset_position_ids: bool = setting(
        False,
        "Count positions (RoPE) from 0 in each document. With --reset-attention-mask it changes rounding only: RoPE is "
        "relative.",
    )
    num_workers: int | None = setting(
        None,
        "Processes that read data for each rank; 0 reads in the training process. Default: 2 on a GPU, 0 on a CPU.",
        at_least=0,
        per_rank="value",
    )


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """The run directory: checkpoints, metrics.jsonl, TensorBoard."""

    save: str | None = setting(None, "Run directory to write.", metavar="RUN", per_rank="path")
    load: str | None = setting(
        None,
        "Run directory to continue from: its newest checkpoint that is whole. auto: that of --save, or a new start "
        "where there is none, which is what a restart should do. Or one checkpoint (RUN/iter_0000100).",
        metavar="RUN|auto",
        per_rank="path",
    )
    pretrained_checkpoint: str | None = setting(
        None,
        "Run directory, or checkpoint, whose student a new run starts from: its weights only, without optimizer, step "
        "or data position.",
        metavar="RUN",
        per_rank="path",
    )
    save_interval: int | None = setting(None, "Steps between checkpoints. Default: only at the end.", at_least=1)
    async_save: bool = setting(
        False,
        "Write checkpoints in the background, from a copy in memory beside each process; training goes on.",
    )
    keep_last: int | None = setting(
        None, "Remove checkpoints older than the newest this many. Default: keep all.", at_least=1
    )
    save_retain_interval: int | None = setting(
        None,
        "Keep the checkpoints whose step this divides, whatever --keep-last (1 unless given) removes. Default: all.",
        at_least=1,
    )


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What is reported, and how often."""

    log_interval: int = setting(10, "Steps between console lines and metrics.jsonl records.", at_least=1)
    eval_interval: int | None = setting(
        None, "Steps between validations. Default: only before the first and after the last step.", at_least=1
    )
    eval_iters: int = setting(10, "Global batches per validation; 0 turns it off.", at_least=0)
    log_effective_rank: bool = setting(
        False, "With each validation, measure the effective rank of both models' hidden states, layer by layer."
    )
    log_layers_to_tensorboard: bool = setting(
        False,
        "Show clone losses and effective ranks layer by layer on TensorBoard and Weights & Biases too, where else "
        "there is one number for all layers. metrics.jsonl has each layer's in any case.",
        per_rank="value",
    )
    log_straggler: bool = setting(
        False, "With each record name the slowest rank, by the time that each works without waiting for others."
    )
    peak_tflops: float | None = setting(
        None,
        "Peak TFLOP/s of one device in the run's precision, for the share of it that is used (MFU). Default: that of a "
        "well-known data-centre GPU; on CPU and other devices no MFU.",
        above=0,
        per_rank="value",
    )
    wandb_project: str | None = setting(
        None,
        "Show the run in this project of Weights & Biases too (needs the package wandb).",
        metavar="NAME",
        per_rank="value",
    )
    wandb_exp_name: str | None = setting(
        None, "The run's name there. Default: that of the directory --save.", metavar="NAME", per_rank="value"
    )
