"""One step of a clone in fp64: its layouts, sizes and losses, its gradients on ranks, and those of the reference."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from built_stages import build_stages
from megatron_lrc.checkpoints.layout import SITES
from megatron_lrc.clone.initialization import initialize_random
from megatron_lrc.clone.projections import Projections
from megatron_lrc.clone.sites import select
from megatron_lrc.config import Config, validate
from megatron_lrc.data.batches import find_documents
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.teacher import TeacherReader
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.optimizer import build_optimizer
from megatron_lrc.mcore.stages import Trained
from megatron_lrc.methods import method_of
from megatron_lrc.methods.lrc.calibration import calibrate_losses
from megatron_lrc.train import step
from ranks import run_ranks
from reference import Reference, document_numbers, positions_in_documents

VOCAB = 96  # padded to 256 at TP 2: the second rank has nothing but padding
ALPHA, KL_WEIGHT, TEMPERATURE = 0.3, 0.7, 40.0


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    micro: int = 6  # sequences: 4 micro-batches without data parallelism
    first: int | None = None
    chunks: int = 1
    ends: bool = False  # embedding and loss count as layers
    recompute: str | None = None
    dist_opt: bool = False
    drawn: str | None = None  # --pipeline-model-parallel-layout
    share: bool = False  # --share-compose
    overlap: bool = False  # --overlap-grad-reduce

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp * self.cp


@dataclass(frozen=True)
class Sizes:
    """Of a run. student: its hidden size; batch: sequences per step; vocab: ids that occur; eod: ends a document.
    turns: whether what counts are turns of a chat. corrupted: whether other tokens are where nothing that counts sees
    them."""

    student: int = 20
    sequence: int = 16
    batch: int = 24
    vocab: int = VOCAB
    eod: int = -1
    turns: bool = False
    corrupted: bool = False


@dataclass(frozen=True)
class Variant:
    """What is trained on. divergence, top_k: as --kl-divergence and --kl-top-k. terms: as --clone-terms; off: the
    (layer, site) pairs that they leave out. student_epsilon: of the student's norms, if not the teacher's. kept: the
    teacher's layers that the student has, if not all; groups, neurons: how many of each layer's KV groups and FFN
    neurons it has, if not all."""

    released: bool = False
    detach: bool = False
    normalization: str = "none"
    lm_weight: float = 1.0
    kl_weight: float = KL_WEIGHT
    divergence: str = "forward"
    top_k: int | None = None
    alpha: float = ALPHA
    terms: str = "q k v o gate up down"
    off: tuple[tuple[int, str], ...] = ()
    reset_attention: bool = False
    reset_positions: bool = False
    student_epsilon: float | None = None
    kept: tuple[int, ...] | None = None
    groups: int | None = None
    neurons: int | None = None


SIZES, PLAIN = Sizes(), Variant()


def gradient_config(
    teacher: str, layout: Layout, *, untie: bool | None, variant: Variant = PLAIN, sizes: Sizes = SIZES
) -> Config:
    config = Config()
    config.model.teacher, config.model.student_hidden_size = teacher, sizes.student
    config.model.untie_embeddings_and_output_weights = untie
    config.model.student_norm_epsilon = variant.student_epsilon
    config.model.student_layers = [str(layer) for layer in variant.kept or ()]
    config.model.student_num_query_groups, config.model.student_ffn_hidden_size = variant.groups, variant.neurons
    config.projection.init_method_std = 0.2
    config.loss.alpha, config.loss.lm_weight = variant.alpha, variant.lm_weight
    config.loss.kl_weight, config.loss.kl_temperature = variant.kl_weight, TEMPERATURE
    config.loss.kl_divergence, config.loss.kl_top_k = variant.divergence, variant.top_k
    config.loss.clone_normalization = variant.normalization
    if config.calibrations:
        config.projection.calibration_tokens = sizes.batch * sizes.sequence
    config.loss.detach_clone_targets, config.loss.clone_terms = variant.detach, variant.terms.split()
    if variant.released:
        config.loss.clone_attention_output, config.loss.kl_reduction = "teacher", "sequence-sum"
    config.data.reset_attention_mask, config.data.reset_position_ids = variant.reset_attention, variant.reset_positions
    config.parallel.recompute_granularity = layout.recompute and ("full" if layout.recompute == "full" else "selective")
    config.parallel.recompute_modules = ["core_attn"] if layout.recompute in (None, "full") else [layout.recompute]
    config.loss.loss_chunk_tokens = 7
    config.parallel.tensor_model_parallel_size = layout.tp
    config.parallel.pipeline_model_parallel_size = layout.pp
    config.parallel.context_parallel_size = layout.cp
    config.parallel.pipeline_model_parallel_layout = layout.drawn
    config.parallel.sequence_parallel = layout.tp > 1
    config.parallel.decoder_first_pipeline_num_layers = layout.first
    config.parallel.num_virtual_stages_per_pipeline_rank = layout.chunks if layout.chunks > 1 else None
    config.parallel.account_for_embedding_in_pipeline_split = layout.ends
    config.parallel.account_for_loss_in_pipeline_split = layout.ends
    config.parallel.use_distributed_optimizer = layout.dist_opt
    config.parallel.share_compose, config.parallel.overlap_grad_reduce = layout.share, layout.overlap
    config.parallel.ddp_bucket_size = 2000 if layout.overlap else None
    config.training.micro_batch_size, config.training.global_batch_size = layout.micro, sizes.batch
    config.training.seq_length = sizes.sequence
    config.data.data_path, config.data.split = ["unused"], "90,10,0"
    config.training.train_iters = 10
    return config


def some_gain(name: str, size: int) -> torch.Tensor:
    return 1 + 0.1 * torch.sin(torch.arange(size, dtype=torch.float64) + len(name))


def global_batch(sizes: Sizes = SIZES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(sizes.vocab, (sizes.batch, sizes.sequence + 1), generator=generator)
    # Ragged: a mean per micro-batch would differ.
    mask = (torch.rand(sizes.batch, sizes.sequence, generator=generator) > 0.25).float()
    if sizes.turns:
        mask = mask_of_turns(sizes)
    tokens, labels = tokens[:, :-1], tokens[:, 1:]
    if sizes.corrupted:
        tokens, labels = corrupt(tokens, labels, mask, sizes.vocab)
    positions = positions_in_documents(tokens, sizes.eod)
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}


def mask_of_turns(sizes: Sizes) -> torch.Tensor:
    """[batch, sequence]: two turns in each sequence, none at its end; no turn in the first six sequences."""
    mask = torch.zeros(sizes.batch, sizes.sequence)
    for row in range(6, sizes.batch):
        first, second = 1 + row % 3, sizes.sequence // 2 + row % 2
        mask[row, first : first + 1 + row % 4] = 1
        mask[row, second : sizes.sequence - 2 - row % 3] = 1
    return mask


def corrupt(tokens: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, vocab: int) -> tuple[torch.Tensor, ...]:
    """Other labels wherever they do not count; other tokens after the last position of a sequence that does."""
    counts = mask.bool()
    is_after = counts.flip(1).cumsum(1).flip(1) == 0
    return torch.where(is_after, (tokens + 7) % vocab, tokens), torch.where(counts, labels, (labels + 5) % vocab)


def own_micro_batches(config: Config, groups: distributed.Groups, sizes: Sizes):
    """This replica's share of the global batch, in micro-batches."""
    size = config.training.micro_batch_size
    for start in range(groups.dp.rank() * size, sizes.batch, size * groups.dp.size()):
        batch = {name: value[start : start + size].contiguous() for name, value in global_batch(sizes).items()}
        documents = {"documents": find_documents(batch["position_ids"])} if config.data.reset_attention_mask else {}
        yield batch | documents


def clone_gradients(config: Config, sizes: Sizes = SIZES) -> tuple[dict, dict, dict]:
    """On a rank: the losses, and (gradient, value) of each projection (this rank's rows) and gain after reduction."""
    groups = distributed.start(config)
    teacher = describe_teacher(config.model.teacher)

    def calibration():
        return own_micro_batches(config, groups, sizes)

    stages = build_stages(config, teacher, TeacherReader(teacher), groups, torch.float64, calibration=calibration)
    for stage in stages:
        initialize_random(stage.projections, std=config.projection.init_method_std, seed=1)
        for name, gain in stage.projections.named_norms():
            gain.data.copy_(some_gain(name, sizes.student))
    calibrate_losses(config, stages, calibration)
    optimizer = build_optimizer(config, stages, groups)
    num_micro_batches = config.num_microbatches(distributed.world_size())
    run = step.Run(method_of(config), groups, stages, optimizer, num_micro_batches)

    optimizer.zero_grad()
    run.compose()
    batches = own_micro_batches(config, groups, sizes)
    step.forward_backward(stages, batches, config, num_microbatches=num_micro_batches)
    run.pull_back()
    losses, _ = step._reduce_losses(stages)
    optimizer.reduce_gradients(losses.tokens)

    def report(list_parameters):
        named = [pair for stage in stages for pair in list_parameters(stage.projections)]
        return {name: (parameter.main_grad.clone(), parameter.detach().clone()) for name, parameter in named}

    matrices = {name: (groups.tp.rank(), *pair) for name, pair in report(Projections.named_matrices).items()}
    values = {"lm": losses.lm / losses.tokens, "kl": losses.kl / losses.tokens, "clone": losses.clone / losses.tokens}
    return values, matrices, report(Projections.named_norms)


@functools.cache
def reference_gradients(teacher: str, names: tuple[str, ...], variant: Variant, sizes: Sizes = SIZES):
    """Reference losses and gradients for the projections `names`, initialised as the package does."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    reference = Reference(model, sizes.student, variant.student_epsilon, variant.kept, variant.groups, variant.neurons)
    teacher_size = reference.teacher.config.hidden_size
    projections = {}
    for name in names:
        seed = int.from_bytes(hashlib.sha256(f"1:{name}".encode()).digest()[:8], "little") >> 1
        matrix = torch.randn(teacher_size, sizes.student, generator=torch.Generator().manual_seed(seed)) * 0.2
        projections[name] = matrix.double().requires_grad_()
    kinds = reference.norm_names.values()
    gains = [f"layers.{layer}.{kind}" for layer in range(reference.num_layers) for kind in kinds]
    norms = {name: some_gain(name, sizes.student).requires_grad_() for name in [*gains, "final"]}
    batch = global_batch(replace(sizes, corrupted=False))
    documents = document_numbers(batch["tokens"], sizes.eod) if variant.reset_attention else None
    positions = batch["position_ids"] if variant.reset_positions else None
    if variant.groups or variant.neurons:
        reference.choose_rows(batch["tokens"], documents, positions)
    losses = reference.losses(
        projections,
        norms,
        tokens=batch["tokens"],
        labels=batch["labels"],
        mask=batch["loss_mask"],
        temperature=TEMPERATURE,
        kl_divergence=variant.divergence,
        kl_top_k=variant.top_k,
        attention_at_teacher_width=variant.released,
        detach_targets=variant.detach,
        is_relative=variant.normalization == "token",
        documents=documents,
        positions=positions,
    )
    for place in variant.off:
        del losses.clone[place]
    # The released code sums KL(p_T || p_S) of logits / tau over a sequence, without tau^2.
    kl_weight = variant.kl_weight * (sizes.sequence / TEMPERATURE**2 if variant.released else 1.0)
    losses.total(variant.alpha, kl_weight, variant.lm_weight).backward()
    return losses, projections, norms


def compare_with_the_reference(
    teacher: str, layout: Layout, variant: Variant = PLAIN, *, tied: bool, sizes: Sizes = SIZES
) -> tuple[str, ...]:
    """One step on this layout, held against the reference. Names of the projections that were compared."""
    config = gradient_config(teacher, layout, untie=not tied, variant=variant, sizes=sizes)
    validate(method_of(config), world_size=layout.world)
    ranks = run_ranks(layout.world, clone_gradients, config, sizes)
    names = tuple(sorted({name for _, matrices, _ in ranks for name in matrices}))
    losses, projections, norms = reference_gradients(teacher, names, variant, sizes)

    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)
    for values, _, _ in ranks:
        close(values["lm"], losses.lm.detach())
        if variant.kl_weight:
            close(values["kl"], losses.kl.detach())
        for (layer, site), value in losses.clone.items():
            close(values["clone"][layer, ["q", "k", "v", "o", "gate", "up", "down"].index(site)], value.detach())
    for _, matrices, gains in ranks:
        for name, (tp_rank, grad, value) in matrices.items():
            close(value, projections[name].detach().chunk(layout.tp)[tp_rank])
            close(grad, projections[name].grad.chunk(layout.tp)[tp_rank])
        for name, (grad, _) in gains.items():
            close(grad, norms[name].grad)
    return names


def weight_parts(trained: Trained, tensor: Tensor, stage) -> Iterator[tuple[str, int | None, Tensor]]:
    """(our name, dimension that TP splits, part in Hugging Face's order of rows) of each weight in a parameter."""
    layer = "" if trained.layer is None else f"layers.{trained.layer[0]}."
    if trained.groups == ("biases",):
        for site in "qkv":
            yield f"{layer}{site}_bias", 0, select(SITES[site], tensor, stage.heads).flatten()
    elif trained.groups == ("norms",):
        yield trained.name, None, tensor
    else:
        for group in trained.groups:
            part = select(SITES[group], tensor, stage.heads)
            yield layer + group, trained.split, part.flatten(0, 1) if part.dim() == 3 else part
