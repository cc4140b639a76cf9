"""Stage 3: two steps of a small paired model in each precision, against the reference of the tests in fp64.

Two steps, since what is kept from one to the next can go wrong: quantised weights, gradients that are not zeroed, the
scales of delayed scaling. Before the second one the reference takes over the run's projections and gains, and the rate
is so high that a step with the weights of the one before would be far off.
"""

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.gpu_check.checks import Bound, Check, Checks, Figures
from benchmarks.gpu_check.left_behind import forget_scaling_state
from benchmarks.gpu_check.possible import need_support
from benchmarks.gpu_check.settings import Settings
from benchmarks.gpu_check.small_teacher import teacher_of
from benchmarks.measured_models import build_run
from megatron_lrc.clone.projections import gradient_of
from megatron_lrc.config import Config, validate_against_teacher
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.mcore import distributed
from megatron_lrc.methods import method_of
from megatron_lrc.train.step import Run, train_step

ORACLE = Path(__file__).parents[2] / "tests" / "reference.py"
RATE, STD = 0.02, 0.06

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Tolerance:
    """Of relative differences: each loss's; of every projection's and gain's gradient, by norm, the largest."""

    losses: float
    gradients: float


#: Some three times what the arithmetic made of this model's losses and gradients on a CPU: in bf16 4e-4 and 0.012 (2e-3
#: and 0.009 at the sizes of --tiny); in FP8 0.01 and 0.16, where it was simulated by rounding both operands of every
#: product of both models' layers, scaled by tensor or, as in the first pass of delayed scaling, not at all.
TOLERANCES = {"fp32": Tolerance(1e-4, 1e-4), "bf16": Tolerance(5e-3, 4e-2), "fp8": Tolerance(3e-2, 0.4)}


@dataclass(frozen=True)
class Variant:
    """compute, parallel: settings of these sections of the configuration."""

    name: str
    precision: str
    compute: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)


FULL = {"recompute_granularity": "full"}
LOCAL, ENGINE = {"transformer_impl": "local"}, {"transformer_impl": "transformer_engine"}


def variants() -> Iterator[Variant]:
    yield Variant("local fp32", "fp32", LOCAL)
    yield Variant("Transformer Engine bf16, fused wgrad", "bf16", ENGINE)
    yield Variant("Transformer Engine bf16", "bf16", {**ENGINE, "gradient_accumulation_fusion": False})
    for recipe, teacher, recompute in itertools.product(
        ("tensorwise", "blockwise", "delayed", "mxfp8"), (True, False), ({}, FULL)
    ):
        name = f"FP8 {recipe}{', teacher too' * teacher}{', recompute' * bool(recompute)}"
        fp8 = {"fp8_format": "hybrid", "fp8_recipe": recipe, "teacher_fp8": teacher}
        yield Variant(name, "fp8", ENGINE | fp8, recompute)
    yield Variant("local bf16", "bf16", LOCAL)
    yield Variant("local fp32, recompute", "fp32", LOCAL, FULL)


def checks(settings: Settings) -> Checks:
    oracle = Oracle(settings)
    with ExitStack() as at_the_end:
        groups = distributed.start(config_of(settings, Variant("", "fp32")))
        at_the_end.callback(distributed.stop)
        for variant in variants():
            yield Check(variant.name, lambda variant=variant: compare(settings, variant, oracle, groups))


def config_of(settings: Settings, variant: Variant) -> Config:
    """Not yet checked. Gradients are not clipped, since they are looked at after the step."""
    config, sizes = Config(), settings.sizes
    config.model.teacher, config.model.student_hidden_size = teacher_of(settings), sizes.student
    training = config.training
    training.seq_length, training.micro_batch_size = sizes.sequence, sizes.micro_batch
    training.global_batch_size = sizes.micro_batch * sizes.num_microbatches
    training.bf16, training.train_iters = variant.precision != "fp32", 10
    config.optimizer.lr, config.optimizer.lr_warmup_iters, config.optimizer.clip_grad = RATE, 0, 0.0
    for section, values in ((config.compute, variant.compute), (config.parallel, variant.parallel)):
        for name, value in values.items():
            setattr(section, name, value)
    return config.resolved(1)


def compare(settings: Settings, variant: Variant, oracle: "Oracle", groups: distributed.Groups) -> Figures:
    """The largest differences of two steps from the reference, beside what is allowed; and those of the second step's
    gradients from the first one's, beside which that is little."""
    config = config_of(settings, variant)
    need_support(settings, config)
    forget_scaling_state()
    base = describe_teacher(str(config.model.teacher))
    validate_against_teacher(method_of(config), base.shape)
    batches = itertools.cycle(oracle.batches)
    run = build_run(config, base, open_teacher(base), groups, batches, is_new=False)
    set_trained(run, oracle.start)
    allowed, figures = TOLERANCES[variant.precision], {}
    for step in (1, 2):
        values = {name: parameter.detach().double() for name, parameter in trained_of(run).items()}
        report = train_step(run, batches)
        expected = oracle.step(values)
        losses = losses_of(report.losses, run)
        gradients = {name: _gradient(parameter) for name, parameter in trained_of(run).items()}
        figures |= {
            f"step {step}: losses": Bound(largest_difference(losses, expected.losses), allowed.losses),
            f"step {step}: gradients": Bound(largest_difference(gradients, expected.gradients), allowed.gradients),
        }
        if step == 2:
            figures["step 2 from step 1"] = largest_difference(gradients, oracle.first.gradients)
    return figures


def trained_of(run: Run) -> dict[str, torch.nn.Parameter]:
    """Projections and norm gains, by the reference's names."""
    return {trained.name: trained.parameter for stage in run.stages for trained in stage.trained()}


@torch.no_grad()
def set_trained(run: Run, values: dict[str, Tensor]) -> None:
    """Where the run begins, in the models and in the optimizer."""
    for name, parameter in trained_of(run).items():
        parameter.copy_(values[name])
    run.optimizer.optimizer.reload_model_params()


def _gradient(parameter: Tensor) -> Tensor:
    gradient = gradient_of(parameter)
    assert gradient is not None
    return gradient


def losses_of(totals: Any, run: Run) -> dict[str, Tensor]:
    """Means over tokens: LM, KL, and every clone term, by the reference's names."""
    clone = totals.clone_by_layer(run.method)
    found = {"LM": totals.lm / totals.tokens, "KL": totals.kl / totals.tokens}
    return found | {
        f"clone {layer} {term}": torch.tensor(value, dtype=torch.float64)
        for term, values in clone.items()
        for layer, value in enumerate(values)
    }


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """By norm, relative to the norm of what is expected."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    return max(
        ((found[name].double().to(exact.device) - exact).norm() / exact.norm()).item()
        for name, exact in expected.items()
    )


@dataclass(frozen=True)
class Expected:
    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Oracle:
    """The same step by the reference: plain autograd of transformers' models in fp64, on the device."""

    def __init__(self, settings: Settings):
        self._settings, sizes = settings, settings.sizes
        self.device = torch.device(settings.device)
        teacher: Any = AutoModelForCausalLM.from_pretrained(teacher_of(settings), dtype=torch.float64)
        with self.device:
            self.reference = load_reference().Reference(teacher.to(self.device), sizes.student)
        self.batches: Batches = [self._batch(number) for number in range(sizes.num_microbatches)]
        self.start = self._first_values()
        self.first = self.step(self.start)

    def _batch(self, number: int) -> dict[str, Tensor]:
        """Other tokens in each micro-batch, and more or fewer of them masked."""
        sizes, generator = self._settings.sizes, torch.Generator().manual_seed(number)
        tokens = torch.randint(sizes.vocabulary, (sizes.micro_batch, sizes.sequence + 1), generator=generator)
        mask = (torch.rand(sizes.micro_batch, sizes.sequence, generator=generator) > 0.2 * (number + 1)).float()
        positions = torch.arange(sizes.sequence).expand(sizes.micro_batch, -1)
        batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "position_ids": positions}
        return {name: tensor.contiguous().to(self.device) for name, tensor in batch.items()}

    def _first_values(self) -> dict[str, Tensor]:
        """Values that bf16 has, in fp64."""
        sizes, generator = self._settings.sizes, torch.Generator().manual_seed(1)
        sites = [f"layers.{layer}.{site}" for layer in range(sizes.layers) for site in load_reference().MODULES]
        kinds = [f"layers.{layer}.{kind}" for layer in range(sizes.layers) for kind in ("input", "post")]
        values = {
            name: STD * torch.randn(sizes.hidden, sizes.student, generator=generator)
            for name in ("embed", "lm_head", *sites)
        } | {name: 1 + 0.1 * torch.randn(sizes.student, generator=generator) for name in (*kinds, "final")}
        return {name: value.bfloat16().double().to(self.device) for name, value in values.items()}

    def step(self, values: dict[str, Tensor]) -> Expected:
        """Losses and gradients over all micro-batches at these values of what is trained."""
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        gains = {name: leaf for name, leaf in leaves.items() if leaf.dim() == 1}
        whole = {name: torch.cat([batch[name] for batch in self.batches]) for name in self.batches[0]}
        loss = Config().loss
        with self.device:
            losses = self.reference.losses(
                {name: leaf for name, leaf in leaves.items() if name not in gains},
                gains,
                tokens=whole["tokens"],
                labels=whole["labels"],
                mask=whole["loss_mask"],
                temperature=loss.kl_temperature,
            )
        losses.total(loss.alpha, loss.kl_weight, loss.lm_weight).backward()
        clone = {f"clone {layer} {site}": value.detach() for (layer, site), value in losses.clone.items()}
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return Expected({"LM": losses.lm.detach(), "KL": losses.kl.detach(), **clone}, gradients)


def load_reference() -> ModuleType:
    """tests/reference.py, from where it is: `tests` is no package."""
    if "reference" not in sys.modules:
        spec = importlib.util.spec_from_file_location("reference", ORACLE)
        assert spec and spec.loader
        sys.modules["reference"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["reference"]
