"""When weights are quantised: the schedules tell a student's modules at the first micro-batch of each step and of each
validation batch, on every stage and chunk, and its teacher's at the first of the run."""

from dataclasses import replace

import pytest
from torch import nn

from megatron_lrc.config import Config
from megatron_lrc.mcore.gpt_models import layers_of
from megatron_lrc.mcore.stages import PipelineStage
from megatron_lrc.methods.lrc.method import LowRankClone
from megatron_lrc.methods.method import Materials
from megatron_lrc.train import loop
from ranks import run_ranks
from runs import make_config, on_layout

MODELS = ("teacher", "student")


class Noting(nn.Module):
    """Takes part as Transformer Engine's linear layers do: the flag is read, and cleared, in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.is_first_microbatch = True
        self.seen: list[bool] = []

    def note(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        self.seen.append(self.is_first_microbatch)
        self.is_first_microbatch = False


def train_and_note(config: Config) -> dict[str, list[list[bool]]]:
    """Model -> for each of this rank's layers, whether each of its passes was told to be a first micro-batch's."""
    notes: dict[str, list[Noting]] = {name: [] for name in MODELS}
    build_stages = LowRankClone.build_stages

    def with_notes(method: LowRankClone, materials: Materials) -> list[PipelineStage]:
        stages = build_stages(method, materials)
        for stage in stages:
            for name, model in stage.models.items():
                # As where FP8 is on; megatron-core without Transformer Engine does nothing more about it.
                model.config.fp8 = "e4m3"
                model.__dict__.pop("modules_with_is_first_microbatch", None)  # found when the teacher was read
                for _, layer in layers_of(model):
                    notes[name].append(Noting())
                    layer.add_module("noting", notes[name][-1])
                    layer.register_forward_pre_hook(notes[name][-1].note, with_kwargs=True)
        return list(stages)

    LowRankClone.build_stages = with_notes
    loop.train(config)
    return {name: [noting.seen for noting in of_model] for name, of_model in notes.items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "ranks, layout",
    [(1, {}), (2, {"pp": 2}), (2, {"pp": 2, "chunks": 2})],
    ids=["one", "PP2", "PP2x2"],
)
def test_a_student_is_told_each_step_and_a_teacher_once(tiny_llama, tiny_text, tmp_path, ranks, layout):
    config = on_layout(make_config(tiny_llama(num_layers=4), tiny_text, tmp_path / "run", steps=2), **layout)
    config = replace(config, logging=replace(config.logging, eval_iters=2)).resolved(ranks)
    first, later = [True], [False]
    a_pass = first + later * 3  # four micro-batches
    validation, step = 2 * a_pass, a_pass
    for found in run_ranks(ranks, train_and_note, config):
        for passes in found["student"]:
            assert passes == validation + 2 * step + validation
        for passes in found["teacher"]:
            assert passes == first + later * (2 * len(validation) + 2 * len(step) - 1)
        assert len(found["student"]) == 4 // ranks
