"""A naive Low-Rank Clone: what one would write first, with transformers' models and plain autograd.

Student weights are composed from the projections inside the graph of every micro-batch, so that autograd pulls the
gradients back; hooks keep both models' activations; the logits of both exist whole, in fp32. It shares no code of the
method with the package and has to give the same losses and gradient norm: `benchmark.py step` measures against it.

Notation: D teacher hidden, d student hidden; shapes of activations are transformers', [batch, sequence, features].
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_lrc.config import Config
from megatron_lrc.hf.families import TeacherDescription, expected_weights
from megatron_lrc.hf.reader import Reader
from megatron_lrc.hf.student_config import student_config, student_family
from megatron_lrc.methods import method_of

MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
PROJECTS_OUTPUT = ("o", "down")


@dataclass(frozen=True)
class NaiveReport:
    """Means over the tokens of one step; clone [layers, 7] in the order of MODULES; the gradient norm before clipping.

    All are still on the device.
    """

    lm: Tensor
    kl: Tensor
    clone: Tensor
    grad_norm: Tensor

    def cpu(self) -> "NaiveReport":
        return NaiveReport(self.lm.cpu(), self.kl.cpu(), self.clone.cpu(), self.grad_norm.cpu())


class NaiveClone:
    """Teacher and student of one process, and AdamW on fp32 projections and norm gains.

    projections, norms: the values to begin with, by the names of `clone/projections.py`; copied.
    """

    def __init__(
        self,
        config: Config,
        teacher: TeacherDescription,
        reader: Reader,
        *,
        projections: Mapping[str, Tensor],
        norms: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.config, self.dtype, self.num_layers = config, dtype, teacher.shape.num_layers
        self.projections, self.norms = (
            {name: nn.Parameter(value.detach().to(device, torch.float32, copy=True)) for name, value in values.items()}
            for values in (projections, norms)
        )
        self.parameters = [*self.projections.values(), *self.norms.values()]
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.peak_lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
        )
        shape = method_of(config).student_shape(teacher.shape)
        family = student_family(teacher, shape.hidden_size)
        values = dict(student_config(teacher, shape, family, dtype=dtype))
        self.student = _empty_model(AutoConfig.for_model(values.pop("model_type"), **values), dtype, device)
        self.student_weights = expected_weights(family, shape)
        self.teacher = _empty_model(teacher.hf_config, dtype, device)
        self.old = {key: value.to(device, dtype) for key, value in all_weights(reader)}
        names = {weight.key: weight.name for weight in expected_weights(teacher.family, teacher.shape)}
        state = {names[key]: value for key, value in self.old.items()}
        state.setdefault("lm_head.weight", self.old["embed"])
        self.teacher.load_state_dict(state, assign=True)
        self.teacher.requires_grad_(False)
        self.outputs: dict[tuple[str, int, str], Tensor] = {}
        self._keep_outputs("teacher", self.teacher)
        self._keep_outputs("student", self.student)

    def _keep_outputs(self, which: str, model: Any) -> None:
        def keep(key: tuple[str, int, str], output: Tensor) -> None:
            self.outputs[key] = output

        for index, layer in enumerate(model.model.layers):
            for site, path in MODULES.items():
                layer.get_submodule(path).register_forward_hook(
                    lambda module, inputs, output, key=(which, index, site): keep(key, output)
                )

    def compose(self) -> dict[str, Tensor]:
        """transformers' name -> the student's weight, inside the graph."""
        weights = {}
        for weight in self.student_weights:
            if weight.is_zero:
                weights[weight.name] = torch.zeros(weight.shape, dtype=self.dtype, device=self.old["embed"].device)
            elif weight.is_frozen:
                weights[weight.name] = self.old[weight.key]
            elif weight.site is None:
                weights[weight.name] = self.norms[weight.key].to(self.dtype)
            else:
                old, projection = self.old[weight.key], self.projections[weight.key].to(self.dtype)
                is_output = weight.site.name in PROJECTS_OUTPUT
                weights[weight.name] = projection.t() @ old if is_output else old @ projection
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        return weights

    def losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """LM, KL (with tau^2) and the clone terms [layers, 7], means over the tokens of a batch without masked ones."""
        inputs, tau = {"input_ids": batch["tokens"], "use_cache": False}, self.config.loss.kl_temperature
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits.float()
        student_logits = torch.func.functional_call(
            self.student, self.compose(), (), inputs, tie_weights=False
        ).logits.float()
        lm = F.cross_entropy(student_logits.flatten(0, 1), batch["labels"].flatten())
        kl = F.kl_div(
            F.log_softmax(student_logits / tau, dim=-1).flatten(0, 1),
            F.log_softmax(teacher_logits / tau, dim=-1).flatten(0, 1),
            reduction="batchmean",
            log_target=True,
        )
        clone = [self._clone_loss(layer, site) for layer in range(self.num_layers) for site in MODULES]
        self.outputs.clear()
        return lm, tau**2 * kl, torch.stack(clone).view(self.num_layers, len(MODULES))

    def _clone_loss(self, layer: int, site: str) -> Tensor:
        target = self.outputs["teacher", layer, site]
        if site in PROJECTS_OUTPUT:
            target = target @ self.projections[f"layers.{layer}.{site}"].to(self.dtype)
        return F.mse_loss(self.outputs["student", layer, site].float(), target.float())

    def step(self, batches: Iterator[Mapping[str, Tensor]], num_microbatches: int) -> NaiveReport:
        """One optimizer step."""
        settings = self.config.loss
        self.optimizer.zero_grad()
        sums = []
        for _ in range(num_microbatches):
            lm, kl, clone = self.losses(next(batches))
            loss = settings.lm_weight * lm + self.config.total_kl_weight * kl + settings.alpha * clone.sum()
            (loss / num_microbatches).backward()
            sums.append((lm.detach(), kl.detach(), clone.detach()))
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip_grad)
        self.optimizer.step()
        lm, kl, clone = (torch.stack(values).mean(0) for values in zip(*sums, strict=True))
        return NaiveReport(lm, kl, clone, grad_norm)


def _empty_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A transformers model whose parameters are still to be set; only its RoPE frequencies have values."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval()


def all_weights(reader: Reader) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of every weight of a teacher, in the order of `expected_weights`."""
    teacher = reader.description
    for weight in expected_weights(teacher.family, teacher.shape):
        is_zero = weight.is_zero
        yield weight.key, torch.zeros(weight.shape) if is_zero else reader.tensor(weight.local_name, weight.layer)
