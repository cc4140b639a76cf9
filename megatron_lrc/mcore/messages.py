"""What pipeline stages send each other: forward the hidden states of all models, back the student's gradient alone.

megatron-core's schedules give both directions one shape and one tensor, so that the gradient of the teacher's hidden
state, zeros that nobody reads, would be the larger part of every message back: D of its D + d features. Here it is left
out where gradients are sent, and put back, as zeros, where they arrive.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup


def own_messages(config: TransformerConfig, pp_group: ProcessGroup, frozen_width: int) -> dict[str, Any]:
    """Arguments of megatron-core's schedule. Empty where its own messages are as short as can be."""
    if not frozen_width or pp_group.size() == 1:
        return {}
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "cp", "embd", "pos_embd", "dp_cp"])
    return {"p2p_communicator": StudentGradients(pp_group, config, frozen_width), "pg_collection": groups}


class StudentGradients(P2PCommunicator):
    """megatron-core's exchanges, but for the first `frozen_width` features of gradients, which are not sent.

    Its own code asks for the shape of each direction, as it does where sequences differ in length, and is told.
    """

    def __init__(self, pp_group: ProcessGroup, config: TransformerConfig, frozen_width: int):
        config = copy.copy(config)
        config.variable_seq_lengths = True  # what has it call `_communicate_shapes`; read here only
        super().__init__(pp_group, config)
        self._frozen_width = frozen_width
        self._shape: tuple[int, ...] = ()

    def _communicate_shapes(self, *tensors: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of what comes from the stage before, and of the gradient from the next one: known, so nothing is sent."""
        return self._shape, (*self._shape[:-1], self._shape[-1] - self._frozen_width) if self._shape else ()

    @torch.no_grad()
    def _communicate(
        self, *, tensor_send_prev: Tensor | None, tensor_shape: Any, wait_on_reqs: bool = True, **others: Any
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        self._shape = () if tensor_shape is None else tuple(tensor_shape)
        if tensor_send_prev is not None:
            tensor_send_prev = tensor_send_prev[..., self._frozen_width :].contiguous()
        received, gradient, requests = super()._communicate(  # type: ignore[misc]  # annotated with two
            tensor_send_prev=tensor_send_prev, tensor_shape=tensor_shape, wait_on_reqs=wait_on_reqs, **others
        )
        if gradient is None or wait_on_reqs:
            return received, None if gradient is None else F.pad(gradient, (self._frozen_width, 0)), requests
        whole = gradient.new_zeros(self._shape)
        requests["recv_next"] = _Arrival(requests["recv_next"], gradient, whole[..., self._frozen_width :])
        return received, whole, requests


class _Arrival:
    """A request of a schedule that computes meanwhile: what has come is copied when the schedule waits for it."""

    def __init__(self, request: Any, gradient: Tensor, place: Tensor):
        self._request, self._gradient, self._place = request, gradient, place

    @torch.no_grad()
    def wait(self) -> None:
        self._request.wait()
        self._place.copy_(self._gradient)
