"""The student's own matrices beside a teacher: those that no projection makes, which are trained themselves.

All of them with `--method logits`, and what `--open-after` opens. In a checkpoint they have names and places
that ordinary training gives them (`single_model.trained_parameters`); norm gains stay with the projections.
"""

from collections.abc import Iterator

from torch import nn

from megatron_lrc.config import MATRICES, ModelShape
from megatron_lrc.mcore.gpt_models import GPTModel, norm_gains
from megatron_lrc.mcore.stages import Trained
from megatron_lrc.methods.ordinary.single_model import trained_parameters


def own_parameters(student: GPTModel, shape: ModelShape, own: frozenset[str]) -> Iterator[Trained]:
    """Those of a stage. own: their names, of MATRICES; if all are own, so are q, k, v biases and q, k norms.
    A fused parameter is owned as a whole: gate with up, and q with k and v."""
    gains = norm_gains(student)
    for trained in trained_parameters(student, shape):
        is_matrix = not set(trained.groups).isdisjoint(MATRICES)
        is_owned = not own.isdisjoint(trained.groups) if is_matrix else own.issuperset(MATRICES)
        if is_owned and trained.name not in gains:
            yield trained


def renew_parameters(model: nn.Module) -> None:
    """Give a model new parameters over the same values. What hangs on the old ones is gone with them: DDP's
    hooks and buffers, the hooks that gather gradients, the gradients."""
    renewed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in renewed:  # what is tied stays so
                new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
                marks = {mark: value for mark, value in vars(old).items() if mark in _MARKS}
                vars(new).update(marks)
                renewed[id(old)] = new
            module._parameters[name] = renewed[id(old)]


#: What megatron-core and Transformer Engine say about a parameter when they make it, and read later.
_MARKS = (
    "sequence_parallel",
    "tensor_model_parallel",
    "partition_dim",
    "partition_stride",
    "allreduce",
    "is_embedding_or_output_parameter",
)
