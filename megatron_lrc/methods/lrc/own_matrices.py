"""The student's own matrices beside a teacher: those that no projection makes, which are trained themselves.

All of them with `--method logits`, and what `--open-after` opens. In a checkpoint they have names and places
that ordinary training gives them (`single_model.trained_parameters`); norm gains stay with the projections.
"""

from collections.abc import Iterator

from torch import Tensor, nn

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
                renewed[id(old)] = replacement(old, old.detach().clone())
            module._parameters[name] = renewed[id(old)]


def replacement(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter to stand in a module where another has been."""
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    vars(new).update({mark: value for mark, value in vars(old).items() if mark in _MARKS})
    return new


def give_up_memory(module: nn.Module) -> None:
    """A module whose weight is not read keeps its place and shape, without any values."""
    weight = module.get_parameter("weight")
    module.weight = replacement(weight, weight.detach().to("meta"))  # type: ignore[assignment]


#: What megatron-core and Transformer Engine say about a parameter when they make it, and read later.
_MARKS = (
    "sequence_parallel",
    "tensor_model_parallel",
    "partition_dim",
    "partition_stride",
    "allreduce",
    "is_embedding_or_output_parameter",
)
