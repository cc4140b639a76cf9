"""The whole chain against transformers: what trains is what is exported, and at d_S = d_T it is the teacher."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from built_stages import build_stages
from hf_teachers import (
    OTHERWISE,
    ROTATED,
    write_llama,
    write_llama_with_biases,
    write_mistral,
    write_qwen2,
    write_qwen3,
)
from megatron_lrc.checkpoints.run_directory import newest_checkpoint
from megatron_lrc.config import Config
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.teacher import TeacherReader
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.checkpoint import load_checkpoint
from megatron_lrc.mcore.optimizer import build_optimizer
from ranks import run_ranks
from runs import make_config, on_layout, records, train
from tools_path import convert_to_hf

VOCAB = 301
FAMILIES = {"Llama": write_llama, "Qwen2": write_qwen2, "Qwen3": write_qwen3}
OTHERS = {"Mistral": write_mistral, "Llama with biases": write_llama_with_biases}  # the same tensors, other classes
MORE = {write.__name__: write for write in (*OTHERWISE, *ROTATED)}


@pytest.fixture(params=FAMILIES)
def write_teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., str]:
    """`write_teacher(is_tied=...)`, as `write_llama` -> directory; of each family in turn."""

    def write(**settings) -> str:
        (FAMILIES | OTHERS | MORE)[request.param](tmp_path / "teacher", **settings)
        return str(tmp_path / "teacher")

    return write


def fixed_tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))


def logits_in_training(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """(teacher's, student's) logits [b, s, v] inside the paired model, from the run's newest checkpoint."""
    groups = distributed.start(config)
    teacher = describe_teacher(config.model.teacher)
    stages = build_stages(config, teacher, TeacherReader(teacher), groups, torch.float32)
    load_checkpoint(newest_checkpoint(config.checkpoint.save), stages, build_optimizer(config, stages, groups))
    stage = stages[0]
    stage.compose()
    finals = {}
    for name, model in (("teacher", stage.teacher), ("student", stage.student)):
        model.decoder.final_layernorm.register_forward_hook(lambda *args, name=name: finals.update({name: args[2]}))
    tokens = fixed_tokens()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        stage({"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(tokens.shape), "position_ids": positions})
        divisor = teacher.shape.logits_scaling
        teacher_logits = finals["teacher"] @ stage.teacher.output_layer.weight[:VOCAB].t() / divisor
        student_logits = finals["student"] @ stage.student.output_layer.weight[:VOCAB].t() / divisor
        if cap := teacher.shape.logits_soft_cap:
            teacher_logits, student_logits = (cap * torch.tanh(of / cap) for of in (teacher_logits, student_logits))
    return teacher_logits.transpose(0, 1), student_logits.transpose(0, 1)


def exported_logits(run: Path, output: Path) -> torch.Tensor:
    assert convert_to_hf(["--load", str(run), "--output", str(output)]) == 0
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(fixed_tokens()).logits


@pytest.mark.distributed
@pytest.mark.parametrize(
    "write_teacher",
    [*FAMILIES, *OTHERS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)],
    indirect=True,
)
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_a_student_as_wide_as_its_teacher_is_the_teacher(write_teacher, tiny_text, tmp_path, is_tied):
    """With norms of what blocks give, from its channels: rotated, it is only near."""
    teacher = write_teacher(is_tied=is_tied)
    config = make_config(teacher, tiny_text, tmp_path / "run", steps=0)
    config.model.student_hidden_size = 48
    has_norms_after = describe_teacher(teacher).shape.has_norms_after
    config.projection.init, config.projection.calibration_tokens = "channel" if has_norms_after else "pca", 512
    config = on_layout(config, pp=2)
    train(config, 2)

    original = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = original(fixed_tokens()).logits
    one_rank = on_layout(config)
    teacher_logits, student_logits = run_ranks(1, logits_in_training, one_rank)[0]
    assert (teacher_logits - expected).abs().max() < 1e-3
    assert (student_logits - expected).abs().max() < 1e-3
    assert (exported_logits(tmp_path / "run", tmp_path / "student") - expected).abs().max() < 1e-3
    (validation,) = records(tmp_path / "run", "validation.jsonl")
    assert validation["kl_loss"] < 1e-5 and validation["clone_loss"] < 1e-5 * abs(validation["lm_loss"])


@pytest.mark.distributed
def test_at_full_width_the_lm_loss_is_the_teachers(write_teacher, tiny_text, tmp_path):
    """To 1e-5, on the held-out split, against transformers' own loss on the same tokens."""
    config = make_config(write_teacher(), tiny_text, tmp_path / "run", steps=0)
    config.model.student_hidden_size, config.logging.eval_iters = 48, 1
    config.projection.init, config.projection.calibration_tokens = "pca", 512
    train(config)
    (losses,) = run_ranks(1, teacher_loss_on_first_validation_batch, config.resolved(1))
    (validation,) = records(tmp_path / "run", "validation.jsonl")
    assert validation["lm_loss"] == pytest.approx(losses, abs=1e-5)


def teacher_loss_on_first_validation_batch(config: Config) -> float:
    from megatron_lrc.data.datasets import build_datasets

    _, valid = build_datasets(config)
    samples = [valid[index] for index in range(config.training.global_batch_size)]
    tokens = torch.stack([sample["tokens"] for sample in samples])
    labels = torch.stack([sample["labels"] for sample in samples])
    model = AutoModelForCausalLM.from_pretrained(config.model.teacher, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten()).item()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "is_tied", [pytest.param(False, id="untied", marks=pytest.mark.slow), pytest.param(True, id="tied")]
)
def test_the_exported_student_is_the_one_that_trained(write_teacher, tiny_text, tmp_path, is_tied):
    config = make_config(write_teacher(is_tied=is_tied), tiny_text, tmp_path / "run", steps=3)
    config = on_layout(replace(config, model=replace(config.model, student_hidden_size=20)), tp=2)
    train(config, 2)
    _, in_training = run_ranks(1, logits_in_training, on_layout(config))[0]
    exported = exported_logits(tmp_path / "run", tmp_path / "student")
    assert (exported - in_training).abs().max() < 1e-4
    assert in_training.std() > 0.01, "logits that are all alike would prove nothing"
