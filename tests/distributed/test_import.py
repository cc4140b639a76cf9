"""A teacher as its ranks hold it computes what transformers computes of the same directory, on every layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from built_stages import build_stages
from hf_teachers import OTHERWISE, ROTATED, WRITERS
from megatron_lrc.config import Config
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.teacher import TeacherReader
from megatron_lrc.mcore import distributed
from megatron_lrc.methods.lrc.calibration import forward_teacher
from ranks import run_ranks
from reference import in_fp64
from runs import make_config, on_layout

VOCAB, SEQUENCE = 301, 16
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
FAMILIES = {write.__name__.removeprefix("write_"): write for write in (*WRITERS, *OTHERWISE, *ROTATED)}
HEADS = {"untied": False, "tied": True}

#: id -> ranks and what `on_layout` takes
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2+SP": (2, {"tp": 2}),
    "PP2": (2, {"pp": 2}),
    "PP2-interleaved-x2": (2, {"pp": 2, "chunks": 2}),
}
#: (family, head) -> dtype -> logits [micro-batches * b, s, v]
Logits = dict[tuple[str, str], dict[torch.dtype, Tensor]]


def micro_batches() -> list[Tensor]:
    """Token ids [b, s] of each."""
    return list(torch.randint(VOCAB, (2, 2, SEQUENCE), generator=torch.Generator().manual_seed(3)))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(family, head) -> directory, in fp32; of four layers, as many as interleaved stages need."""
    directories = {}
    for family, write in FAMILIES.items():
        for head, is_tied in HEADS.items():
            directories[family, head] = tmp_path_factory.mktemp(f"{family}-{head}")
            write(directories[family, head], is_tied=is_tied, num_layers=4)
    return directories


@pytest.fixture(scope="module")
def transformers_logits(teachers: dict[tuple[str, str], Path]) -> Logits:
    """In fp32, in fp64 throughout (transformers' own RMSNorm would round to fp32), and in bf16."""
    tokens = torch.cat(micro_batches())
    logits: Logits = {}
    for key, directory in teachers.items():
        logits[key] = {}
        for dtype in DTYPES:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
            with torch.no_grad():
                exact = in_fp64(model) if dtype == torch.float64 else model
                logits[key][dtype] = exact(tokens).logits
    return logits


def capped(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap if cap else logits


@pytest.fixture(scope="module", params=LAYOUTS)
def our_logits(request: pytest.FixtureRequest, teachers: dict[tuple[str, str], Path]) -> Logits:
    """All families in one world per layout."""
    ranks, layout = LAYOUTS[request.param]
    config = on_layout(make_config("", "unused", Path("unused"), steps=0), **layout)
    results = run_ranks(ranks, final_states, config, teachers)
    last = [result for result in results if result]  # by TP rank
    return {
        key: {
            dtype: capped(
                torch.cat([rank[key, dtype][0] for rank in last]).transpose(0, 1)
                @ torch.cat([rank[key, dtype][1] for rank in last])[:VOCAB].t(),
                last[0][key, dtype][2],
            )
            for dtype in DTYPES
        }
        for key in teachers
    }


def final_states(config: Config, teachers: dict[tuple[str, str], Path]) -> dict[tuple, tuple[Tensor, Tensor, float]]:
    """(teacher, dtype) -> (state after the final norm [s/tp, b, D], LM head [v/tp, D], over what divides logits, their
    cap) of the last stage's ranks. In bf16 both come in fp32: logits are, whatever the model's dtype."""
    groups, results = distributed.start(config), {}
    others = {"loss_mask": torch.ones(2, SEQUENCE), "position_ids": torch.arange(SEQUENCE).expand(2, -1)}
    batches = [{"tokens": tokens, "labels": tokens, **others} for tokens in micro_batches()]
    for key, directory in teachers.items():
        config = replace(config, model=replace(config.model, teacher=str(directory)))
        description = describe_teacher(directory)
        for dtype in DTYPES:
            stages = build_stages(config, description, TeacherReader(description), groups, dtype)
            states: list[Tensor] = []
            for stage in stages:
                if stage.post_process:
                    norm: Any = stage.teacher.decoder.final_layernorm
                    norm.register_forward_hook(lambda module, inputs, state, states=states: states.append(state))
            forward_teacher(stages, iter(batches), config, num_microbatches=len(batches))
            if states:
                wide = torch.promote_types(dtype, torch.float32)
                head = stages[-1].teacher.get_parameter("output_layer.weight")
                scaled_head = head.detach().to(wide) / description.shape.logits_scaling
                results[key, dtype] = torch.cat(states, dim=1).to(wide), scaled_head, description.shape.logits_soft_cap
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_on_a_layout_is_transformers_own(our_logits, transformers_logits, family, head):
    """In fp64 to 1e-9, which no other model would pass; in fp32 and bf16 as far from the exact as transformers is."""
    ours, expected = our_logits[family, head], transformers_logits[family, head]
    exact = expected[torch.float64]
    assert exact.std() > 0.1
    assert (ours[torch.float64] - exact).abs().max() < 1e-9
    assert (ours[torch.float32] - expected[torch.float32]).abs().max() < 1e-4

    def rounding(logits: dict[torch.dtype, Tensor]) -> float:
        return (logits[torch.bfloat16].double() - expected[torch.float32]).square().mean().sqrt().item()

    assert rounding(ours) < 2 * rounding(expected)
