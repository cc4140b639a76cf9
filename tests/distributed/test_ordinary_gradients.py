"""Ordinary training: the LM loss and every gradient on every layout against transformers and autograd in fp64."""

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

import megatron_lrc
from built_stages import build_stages
from gradient_cases import SIZES, Layout, global_batch, gradient_config, own_micro_batches, weight_parts
from hf_teachers import write_granite, write_llama, write_qwen2, write_qwen3, write_smollm3
from megatron_lrc.clone.sites import EMBED, LM_HEAD
from megatron_lrc.config import Config, validate
from megatron_lrc.hf.families import describe_teacher, expected_weights
from megatron_lrc.hf.teacher import TeacherReader
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.optimizer import build_optimizer
from megatron_lrc.methods import method_of
from megatron_lrc.train import step
from method_runs import ordinary
from ranks import run_ranks
from reference import causal_mask, in_fp64, masks_of

MODELS = {
    "llama": functools.partial(write_llama, num_layers=4),
    "tied llama": functools.partial(write_llama, num_layers=4, is_tied=True),
    "qwen2": functools.partial(write_qwen2, num_layers=4),
    "tied qwen2": functools.partial(write_qwen2, num_layers=4, is_tied=True),
    "qwen3": functools.partial(write_qwen3, num_layers=4),
    "smollm3": functools.partial(write_smollm3, num_layers=4),
    "granite": functools.partial(write_granite, num_layers=4),
}


def gradients_of_one_step(config: Config) -> tuple[Tensor, dict[str, tuple[int | None, int, Tensor]]]:
    """On a rank: the LM loss, and the gradient of its part of each weight after the reductions."""
    assert Path(megatron_lrc.__file__).is_relative_to(Path(__file__).parents[2])
    groups = distributed.start(config)
    base = describe_teacher(config.model.student)
    stages = build_stages(config, base, TeacherReader(base), groups, torch.float64, is_new=True)
    optimizer = build_optimizer(config, stages, groups)
    num_micro_batches = config.num_microbatches(distributed.world_size())
    optimizer.zero_grad()
    batches = own_micro_batches(config, groups, SIZES)
    step.forward_backward(stages, batches, config, num_microbatches=num_micro_batches)
    losses, _ = step._reduce_losses(stages)
    optimizer.reduce_gradients(losses.tokens)
    found = {}
    for stage in stages:
        for trained in stage.trained():
            for name, split, grad in weight_parts(trained, trained.parameter.main_grad, stage):
                found[name] = (split, groups.tp.rank(), grad.clone())
    return losses.lm / losses.tokens, found


@functools.cache
def expected(model: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and our name -> gradient."""
    reference = in_fp64(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64))
    batch = global_batch()
    mask_of_layers = masks_of(reference.config, causal_mask(batch["tokens"], None))
    logits = reference(batch["tokens"], attention_mask=mask_of_layers).logits
    per_token = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    mask = batch["loss_mask"].double()
    loss = (per_token * mask).sum() / mask.sum()
    loss.backward()
    base = describe_teacher(model)
    names = {weight.key: weight.name for weight in expected_weights(base.family, base.shape)}
    gradients = {key: reference.get_parameter(name).grad for key, name in names.items()}
    assert all(grad is not None for grad in gradients.values())
    return loss.detach(), gradients


@pytest.fixture(scope="session")
def model_named(tmp_path_factory):
    @functools.cache
    def directory(name: str) -> str:
        folder = tmp_path_factory.mktemp("model")
        MODELS[name](folder, dtype=torch.float64)
        return str(folder)

    return directory


def assert_equal_to_the_reference(model: str, layout: Layout) -> None:
    config = ordinary(gradient_config("", layout, untie=None), model)
    validate(method_of(config), world_size=layout.world)
    ranks = run_ranks(layout.world, gradients_of_one_step, config)
    loss, gradients = expected(model)
    assert {name for _, found in ranks for name in found} == set(gradients)
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-13)
    for found_loss, found in ranks:
        close(found_loss, loss)
        for name, (split, tp_rank, grad) in found.items():
            wanted = gradients[name]
            if name in (EMBED.name, LM_HEAD.name):  # the padding has none
                wanted = F.pad(wanted, (0, 0, 0, len(grad) * layout.tp - len(wanted)))
            own = wanted if split is None else wanted.chunk(layout.tp, dim=split)[tp_rank]
            close(grad, own, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.distributed
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_of_one_process_are_those_of_transformers(model_named, name):
    assert_equal_to_the_reference(model_named(name), Layout(micro=8))


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["llama", "tied qwen2", "qwen3"])
@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2), Layout(pp=2, micro=8), Layout(pp=2, chunks=2), Layout(dp=2), Layout(cp=2)]
    + [pytest.param(Layout(tp=2, pp=2, chunks=2), marks=pytest.mark.slow)]
    + [pytest.param(Layout(tp=2, pp=2, drawn="E|ttttL"), marks=pytest.mark.slow)]
    + [pytest.param(Layout(tp=2, cp=2), marks=pytest.mark.slow)],
    ids=str,
)
def test_loss_and_gradients_are_the_same_on_every_layout(model_named, layout, name):
    assert_equal_to_the_reference(model_named(name), layout)


@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["full", "core_attn", "mlp"])
def test_recomputation_changes_nothing(model_named, recompute):
    assert_equal_to_the_reference(model_named("tied llama"), Layout(pp=2, recompute=recompute))
