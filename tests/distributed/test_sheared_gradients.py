"""--method sheared: gradients of weights and masks against transformers and autograd; masked as cut; all in fp64."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from built_stages import build_stages
from gradient_cases import SIZES, Layout, global_batch, gradient_config, own_micro_batches, weight_parts
from hf_teachers import write_llama, write_qwen2, write_qwen3
from megatron_lrc.config import Config, validate
from megatron_lrc.hf.families import describe_teacher, expected_weights
from megatron_lrc.hf.teacher import TeacherReader
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.optimizer import build_optimizer
from megatron_lrc.mcore.stages import Shapes
from megatron_lrc.methods import method_of
from megatron_lrc.methods.sheared.hard_concrete import sample
from megatron_lrc.methods.sheared.masks import Masks
from megatron_lrc.train import step
from method_runs import sheared
from ranks import run_ranks
from reference import causal_mask, in_fp64

pytestmark = pytest.mark.distributed

WRITERS = {"llama": functools.partial(write_llama, num_kv_heads=4), "qwen2": write_qwen2, "qwen3": write_qwen3}
ONE = Layout(micro=8)
LAYOUTS = [Layout(tp=2), Layout(pp=2, micro=8), Layout(pp=2, chunks=2), Layout(dp=2), Layout(cp=2)]

#: Model, whether it is tied, KV groups that are kept (of 4, or of 2), layout.
CASES = [("llama", True, 2, layout) for layout in (ONE, *LAYOUTS)]
CASES += [("llama", True, 2, Layout(tp=2, pp=2, chunks=2)), ("qwen2", False, 1, Layout(pp=2, micro=8))]
CASES += [("qwen2", False, 1, ONE), ("qwen3", True, 1, ONE)]
QUICK = (ONE, Layout(tp=2), Layout(pp=2, chunks=2))
CASES = [pytest.param(*case, marks=[] if case[3] in QUICK else pytest.mark.slow) for case in CASES]


@pytest.fixture(scope="session")
def model_named(tmp_path_factory):
    """`model_named("qwen2", is_tied=True)` -> directory, in fp64. Four layers, 48 hidden, 80 neurons."""

    def directory(name: str, is_tied: bool) -> str:
        folder = tmp_path_factory.mktemp("model")
        WRITERS[name](folder, is_tied=is_tied, dtype=torch.float64, num_layers=4)
        return str(folder)

    return directory


def build(config: Config, base) -> step.Run:
    groups = distributed.start(config)
    stages = build_stages(config, base, TeacherReader(base), groups, torch.float64, is_new=True)
    optimizer = build_optimizer(config, stages, groups)
    run = step.Run(method_of(config), groups, stages, optimizer, config.num_microbatches(distributed.world_size()))
    return run


def log_alphas(masks: Masks) -> Tensor:
    """Wide apart: some z are 0, some 1, some between."""
    generator = torch.Generator().manual_seed(11)
    return 2 * torch.randn(len(masks.gradient), dtype=torch.float64, generator=generator)


def gradients_of_one_step(config: Config) -> tuple[Tensor, dict, dict, dict]:
    run = build(config, describe_teacher(config.model.teacher))
    masks = run.stages[0].masks
    masks.log_alpha.copy_(log_alphas(masks))
    run.optimizer.zero_grad()
    run.zero_student_grads()
    run.compose()
    batches = own_micro_batches(config, run.groups, SIZES)
    step.forward_backward(run.stages, batches, config, num_microbatches=run.num_microbatches)
    run.pull_back()
    losses, _ = step._reduce_losses(run.stages)
    run.optimizer.reduce_gradients(losses.tokens)
    found = {}
    for stage in run.stages:
        for trained in stage.trained():
            for name, split, grad in weight_parts(trained, trained.parameter.main_grad, stage):
                found[name] = (split, run.groups.tp.rank(), grad.clone())
    of_masks = masks.by_mask(distributed.sum_over_world(masks.gradient.clone()) / losses.tokens)
    numbers = {mask.name: masks._numbers(mask, 0) for mask in masks.masks}
    return losses.lm / losses.tokens, found, of_masks, numbers


def expected(model: str, numbers: dict[str, Tensor], values: Tensor) -> tuple[Tensor, dict, dict]:
    """Loss; our name -> gradient; mask -> gradient by log alpha. Masks act on transformers' weights, by autograd."""
    reference, base = in_fp64(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)), describe_teacher(model)
    shape = base.shape
    sizes = [len(drawn) for drawn in numbers.values()]
    log_alpha = {name: part.clone().requires_grad_() for name, part in zip(numbers, values.split(sizes), strict=True)}
    z = {name: sample(log_alpha[name], numbers[name])[0] for name in numbers}
    hidden, per_group = z["hidden"], shape.num_attention_heads // shape.num_query_groups * shape.head_dim
    factor = ((hidden > 0).double().mean()).sqrt()
    own, changed = {}, {}
    for weight in expected_weights(base.family, shape):
        own[weight.key] = parameter = reference.get_parameter(weight.name).detach().clone().requires_grad_()
        kind = weight.key.rpartition(".")[2]
        if kind == "o":
            groups = z[f"layers.{weight.layer}.groups"].repeat_interleave(per_group)
            changed[weight.name] = hidden[:, None] * parameter * groups
        elif kind == "down":
            changed[weight.name] = hidden[:, None] * parameter * z[f"layers.{weight.layer}.neurons"]
        else:
            is_gain = kind in ("input", "post", "final")
            changed[weight.name] = parameter * (hidden if kind == "embed" else factor if is_gain else 1)
    batch = global_batch()
    if shape.is_tied:
        changed["lm_head.weight"] = changed["model.embed_tokens.weight"]
    inputs = {"attention_mask": causal_mask(batch["tokens"], None)}
    logits = functional_call(reference, changed, (batch["tokens"],), inputs).logits
    per_token = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    mask = batch["loss_mask"].double()
    loss = (per_token * mask).sum() / mask.sum()
    loss.backward()
    return loss.detach(), {key: own[key].grad for key in own}, {name: log_alpha[name].grad for name in log_alpha}


@pytest.mark.parametrize("name, is_tied, groups, layout", CASES, ids=str)
def test_gradients_of_weights_and_masks_are_those_of_autograd(model_named, name, is_tied, groups, layout):
    model = model_named(name, is_tied)
    config = sheared(gradient_config(model, layout, untie=None), groups=groups)
    validate(method_of(config), world_size=layout.world)
    ranks = run_ranks(layout.world, gradients_of_one_step, config)
    numbers = ranks[0][3]
    close = lambda one, two, what: torch.testing.assert_close(  # noqa: E731
        one, two, rtol=1e-8, atol=1e-12, msg=lambda text: f"{what}: {text}"
    )
    units = sum(map(len, numbers.values()))
    values = 2 * torch.randn(units, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    loss, gradients, of_masks = expected(model, numbers, values)
    assert {name for rank in ranks for name in rank[1]} == set(gradients)
    for found_loss, found, found_of_masks, _ in ranks:
        close(found_loss, loss, "loss")
        for mask, gradient in found_of_masks.items():
            assert mask != "hidden" or gradient.abs().max() > 0
            close(gradient, of_masks[mask], mask)
        for weight, (split, tp_rank, grad) in found.items():
            wanted = gradients[weight]
            if weight in ("embed", "lm_head"):  # the padding has none
                wanted = F.pad(wanted, (0, 0, 0, len(grad) * layout.tp - len(wanted)))
            close(grad, wanted if split is None else wanted.chunk(layout.tp, dim=split)[tp_rank], weight)


def masked_and_cut(config: Config) -> tuple[float, float, int]:
    """Losses with hard masks and of what they cut, and the hidden size that the schedules see then."""
    base = describe_teacher(config.model.teacher)
    base = replace(base, shape=replace(base.shape, norm_epsilon=1e-14))  # which is added to another mean
    run = build(config, base)
    masks = run.stages[0].masks
    for mask, part in zip(masks.masks, masks.by_mask(masks.log_alpha).values(), strict=True):
        chosen = torch.randperm(mask.size, generator=torch.Generator().manual_seed(mask.size))[: mask.target]
        part.fill_(-40.0)[chosen] = 40.0

    def loss() -> float:
        batches = own_micro_batches(config, run.groups, SIZES)
        losses = step.evaluate(run, batches, num_batches=1)
        return float(losses.lm / losses.tokens)

    before, shape = loss(), method_of(config).student_shape(base.shape)
    for stage in run.stages:
        stage.prune(Shapes(shape, shape, stage.shapes.rotations))
    run.optimizer = build_optimizer(config, run.stages, run.groups)
    return before, loss(), run.stages[0].config.hidden_size


@pytest.mark.parametrize("name, is_tied, groups, layout", CASES, ids=str)
def test_with_hard_masks_the_full_model_is_the_cut_one(model_named, name, is_tied, groups, layout):
    config = sheared(gradient_config(model_named(name, is_tied), layout, untie=None), groups=groups)
    losses = run_ranks(layout.world, masked_and_cut, config)
    for before, after, size in losses:
        assert after == pytest.approx(before, rel=1e-9) and size == 28
    assert method_of(config).student_shape(describe_teacher(config.model.teacher).shape).num_attention_heads == 2
