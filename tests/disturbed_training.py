"""Trainings, each to be run on ranks, in which something goes wrong or is slow."""

import torch

import slow_writers
from megatron_lrc.config import Config, RunStopped
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.gpt_models import layers_of
from megatron_lrc.train import loop
from megatron_lrc.train.start_checks import check


class SpoilGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf


def train_spoiled(config: Config, layer: int, kind: str, steps: tuple[int, ...]) -> str:
    """Train; in these steps spoil the input of a student layer's FFN, or its gradient. Returns what stopped the run."""
    checked = check(config, distributed.world_size())
    trainer = loop.Trainer(config, checked, distributed.start(config))

    def spoil(module, inputs):
        if trainer.state.step + 1 not in steps or not torch.is_grad_enabled():
            return None
        return (inputs[0] * torch.inf if kind == "loss" else SpoilGradient.apply(inputs[0]), *inputs[1:])

    for stage in trainer.run.stages:
        for index, student_layer in layers_of(stage.student):
            if index == layer:
                student_layer.mlp.linear_fc1.register_forward_pre_hook(spoil)
    try:
        trainer.train()
    except RunStopped as stopped:
        return str(stopped)
    return ""


def train_with_slow_writers(config: Config) -> None:
    slow_writers.use("slow_writers:serve_slowly")
    loop.train(config)
