"""Differences between megatron-core versions (0.16 to 0.19), and their defects that we have to step round."""

from typing import Any

from megatron.core.optimizer import MegatronOptimizer


def keep_step_through_load(optimizer: MegatronOptimizer) -> None:
    """Let a DistributedOptimizer over torch's Adam load `fully_reshardable` state.

    0.16.1 copies every entry of a parameter's state from the checkpoint, `step` included, which that format leaves out
    (KeyError: 'step'). Here the present value stands in; the caller sets the true one afterwards.
    """
    set_state = getattr(optimizer, "_set_main_param_and_optimizer_states", None)
    if set_state is None:
        return

    def set_state_with_step(model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]  # type: ignore[attr-defined]
        main_param = optimizer.optimizer.param_groups[group]["params"][order]
        state = optimizer.optimizer.state[main_param]
        if "step" in state:
            tensors = {"step": state["step"], **tensors}
        set_state(model_param, tensors)

    optimizer._set_main_param_and_optimizer_states = set_state_with_step  # type: ignore[attr-defined]
