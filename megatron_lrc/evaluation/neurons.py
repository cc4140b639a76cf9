"""FFN neurons: the inputs of down_proj. How active each is, which of them to mask, and a model with them masked.

A set of neurons is a bool tensor [L, I]: L layers, I FFN width. A masked neuron's activation is 0, as if its column of
down_proj were.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_lrc.config import ConfigError

Scope = Literal["model", "layer"]


def down_projections(model: Any) -> list[nn.Linear]:
    """Each layer's, in order."""
    try:
        return [layer.mlp.down_proj for layer in model.get_decoder().layers]
    except AttributeError as error:
        raise ConfigError(
            f"{type(model).__name__} has no mlp.down_proj in its layers, so its FFN neurons are not known. A model of "
            "the families that can be trained here is expected."
        ) from error


@contextmanager
def _hooks(model: Any, hook_of: Callable[[int], Callable]) -> Iterator[None]:
    """Each layer's hook sees (module, inputs) before down_proj runs."""
    with ExitStack() as stack:
        for number, module in enumerate(down_projections(model)):
            stack.callback(module.register_forward_pre_hook(hook_of(number)).remove)
        yield


@torch.inference_mode()
def mean_activations(model: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """float64 [L, I]: mean of each neuron's absolute activation over the real places of tokens [b, s], real [b, s]."""
    modules = down_projections(model)
    sums = torch.zeros(len(modules), modules[0].in_features, dtype=torch.float64, device=model.device)
    count, here = 0, torch.empty(0)

    def hook_of(layer: int) -> Callable:
        def add(module: nn.Module, inputs: tuple[Tensor]) -> None:
            sums[layer] += inputs[0][here].abs().sum(0, dtype=torch.float64)

        return add

    with _hooks(model, hook_of):
        for tokens, real in batches:
            here = real.to(model.device)
            count += int(real.sum())
            model.get_decoder()(tokens.to(model.device), use_cache=False)
    return (sums / count).cpu()


def most_active(means: Tensor, count: int, scope: Scope) -> Tensor:
    """bool [L, I]: the `count` largest of all ("model"), or of each layer ("layer")."""
    rows = _rows(means, count, scope)
    chosen = torch.zeros(rows.shape, dtype=torch.bool)
    chosen.scatter_(1, rows.topk(count, dim=1).indices, True)
    return chosen.view(means.shape)


def random_neurons(excluded: Tensor, count: int, scope: Scope, seed: int) -> Tensor:
    """bool [L, I]: as many, drawn evenly out of those that `excluded` leaves."""
    draws = torch.rand(excluded.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return most_active(draws.masked_fill(excluded, -1.0), count, scope)


def _rows(values: Tensor, count: int, scope: Scope) -> Tensor:
    rows = values.flatten()[None] if scope == "model" else values
    if not 0 < 2 * count <= rows.shape[1]:
        where = "in the whole model" if scope == "model" else "in a layer"
        raise ConfigError(
            f"--num-neurons {count}: there are {rows.shape[1]} neurons {where}, and as many random ones are to be left "
            f"beside the most active. 1 to {rows.shape[1] // 2} can be masked."
        )
    return rows


@contextmanager
def masked(model: Any, neurons: Tensor) -> Iterator[None]:
    """The model with these neurons' activations at 0, for the time of the block."""
    neurons = neurons.to(model.device)

    def hook_of(layer: int) -> Callable:
        return lambda module, inputs: (inputs[0].masked_fill(neurons[layer], 0),)

    with _hooks(model, hook_of):
        yield
