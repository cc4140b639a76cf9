"""Low-Rank Clone as one writes it first: transformers' modules and autograd, nothing else. A contestant, no product.

The student's weights are composed inside the graph of every micro-batch, all logits of both models exist, and the
teacher's activations are kept until the loss is added up. The losses are the method's (arXiv 2505.12781), so they have
to agree with the product's.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_lrc.clone.checkpoint_layout import SITES
from megatron_lrc.clone.sites import LAYER_SITES
from megatron_lrc.config import Config
from megatron_lrc.hf.families import TeacherDescription, Weight, expected_weights
from megatron_lrc.hf.reader import Reader


class NaiveClone:
    """A training of one process. projections, norms: first values, by the names that the product has for them."""

    def __init__(
        self,
        config: Config,
        description: TeacherDescription,
        reader: Reader,
        projections: dict[str, Tensor],
        norms: dict[str, Tensor],
        *,
        num_microbatches: int,
    ):
        device, dtype = projections["embed"].device, projections["embed"].dtype
        self.config, self.num_microbatches = config, num_microbatches
        self.weights = expected_weights(description.family, description.shape)
        values = {weight.name: read(reader, weight).to(device, dtype) for weight in self.weights}
        self.values = {weight.key: values[weight.name] for weight in self.weights}
        self.teacher = _model(description.hf_config).to(device, dtype)
        self.teacher.load_state_dict(values, strict=False)  # a tied head is named once only
        self.teacher.tie_weights()
        student = copy.deepcopy(description.hf_config)
        student.hidden_size, student.head_dim = config.model.student_hidden_size, description.shape.head_dim
        self.student = _model(student).to(device, dtype)
        for model in (self.teacher, self.student):
            model.requires_grad_(False)
        self.projections = {name: nn.Parameter(value.clone().float()) for name, value in projections.items()}
        self.norms = {name: nn.Parameter(value.clone().float()) for name, value in norms.items()}
        self.trained = [*self.projections.values(), *self.norms.values()]
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.trained, settings.lr, (settings.adam_beta1, settings.adam_beta2), settings.adam_eps, weight_decay=0.0
        )
        self.outputs: dict[tuple[str, str], Tensor] = {}
        names = {weight.key: weight.name for weight in self.weights}
        self.captured = [f"layers.{i}.{site.name}" for i in range(description.shape.num_layers) for site in LAYER_SITES]
        for key in self.captured:
            for of, model in (("T", self.teacher), ("S", self.student)):
                model.get_submodule(names[key].removesuffix(".weight")).register_forward_hook(self._keep(of, key))

    def _keep(self, of: str, key: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.outputs[of, key] = output

        return hook

    def step(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """One optimizer step; its losses, as means over tokens."""
        sums = torch.zeros(3, dtype=torch.float64)
        for _ in range(self.num_microbatches):
            lm, kl, clone = self._losses(next(batches))
            loss = self.config.loss
            total = loss.lm_weight * lm + self.config.total_kl_weight * kl + loss.alpha * clone
            (total / self.num_microbatches).backward()
            sums += torch.stack([lm, kl, clone]).detach().double().cpu() / self.num_microbatches
        nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return dict(zip(("lm_loss", "kl_loss", "clone_loss"), sums.tolist(), strict=True))

    def _student_weights(self) -> dict[str, Tensor]:
        """transformers' name -> W_S, inside the graph."""
        weights = {}
        for weight in self.weights:
            old = self.values[weight.key]
            if weight.key in self.norms:
                weights[weight.name] = self.norms[weight.key].to(old.dtype)
            elif weight.site is not None:
                projection = self.projections[weight.key].to(old.dtype)
                is_output = weight.site.projected == "output"
                weights[weight.name] = projection.t() @ old if is_output else old @ projection
            else:
                weights[weight.name] = old
        if "lm_head.weight" not in weights:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        return weights

    def _losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        tau, inputs = self.config.loss.kl_temperature, {"input_ids": batch["tokens"], "use_cache": False}
        with torch.no_grad():
            teacher = self.teacher(**inputs).logits.float()
        weights = self._student_weights()
        student = torch.func.functional_call(self.student, weights, (), inputs, tie_weights=False).logits.float()
        lm = F.cross_entropy(student.flatten(0, 1), batch["labels"].flatten())
        log_student, log_teacher = (F.log_softmax(z.flatten(0, 1) / tau, -1) for z in (student, teacher))
        kl = tau**2 * F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
        clone = torch.zeros_like(lm)
        for key in self.captured:
            target = self.outputs["T", key]
            if SITES[key.rpartition(".")[2]].projected == "output":
                target = target @ self.projections[key].to(target.dtype)
            clone = clone + F.mse_loss(self.outputs["S", key].float(), target.float())
        self.outputs.clear()
        return lm, kl, clone


def _model(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def read(reader: Reader, weight: Weight) -> Tensor:
    """A whole tensor of the teacher."""
    name = weight.key.rpartition(".")[2]
    if weight.site is not None:
        return reader.site(weight.site, weight.layer)
    if weight.is_zero:
        return torch.zeros(weight.shape)
    return reader.frozen(name, weight.layer or 0) if weight.is_frozen else reader.norm(name, weight.layer)
