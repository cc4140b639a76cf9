"""Which class a student is written as, and what its config.json and model card say."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_teachers import (
    LLAMA3_ROPE,
    write_llama,
    write_llama_with_biases,
    write_mistral,
    write_qwen2,
    write_qwen2_with_windows,
    write_qwen3,
    write_smollm3,
)
from megatron_lrc.config import ConfigError
from megatron_lrc.hf.architectures import LLAMA_WITH_BIASES, MISTRAL
from megatron_lrc.hf.families import TeacherDescription, describe_teacher
from megatron_lrc.hf.student_config import Arch, model_card, student_config, student_family
from megatron_lrc.hf.teacher import TeacherReader
from students import export_student, load, logits_of, random_student


@pytest.fixture
def teacher(tmp_path: Path) -> TeacherDescription:
    write_llama(tmp_path / "teacher")
    return describe_teacher(tmp_path / "teacher")


def test_a_narrower_qwen2_is_written_as_llama_with_biases_and_computes_the_same(tmp_path: Path) -> None:
    """For servers that take the size of a Qwen2 head to be hidden size / heads."""
    write_qwen2(tmp_path / "teacher")
    description = describe_teacher(tmp_path / "teacher")
    projections, norms = random_student(description, 28, has_lm_head=True)
    for arch in ("auto", "native"):
        output = tmp_path / arch
        export_student(
            teacher=description,
            projections=projections,
            norms=norms,
            student_hidden_size=28,
            output=output,
            arch=arch,  # type: ignore[arg-type]
        )
    as_llama, as_qwen2 = load(tmp_path / "auto"), load(tmp_path / "native")
    assert type(as_llama).__name__ == "LlamaForCausalLM" and type(as_qwen2).__name__ == "Qwen2ForCausalLM"
    assert (as_llama.config.head_dim, as_llama.config.attention_bias) == (16, True)
    assert torch.equal(logits_of(as_llama), logits_of(as_qwen2))
    back = describe_teacher(tmp_path / "auto")  # it can be the next teacher
    assert back.family is LLAMA_WITH_BIASES and back.shape == replace(description.shape, hidden_size=28)
    assert TeacherReader(back).frozen("q_bias", 1).equal(TeacherReader(description).frozen("q_bias", 1))


@pytest.mark.parametrize(
    ("write", "hidden", "arch", "architecture"),
    [
        (write_llama, 28, "auto", "LlamaForCausalLM"),
        (write_llama, 30, "auto", "MistralForCausalLM"),
        (write_mistral, 30, "auto", "MistralForCausalLM"),
        (write_mistral, 28, "llama", "LlamaForCausalLM"),
        (write_qwen2, 64, "auto", "Qwen2ForCausalLM"),  # 4 heads of 16
        (write_qwen2, 30, "auto", "Qwen2ForCausalLM"),
        (write_qwen2, 28, "llama", "LlamaForCausalLM"),
        (write_llama_with_biases, 30, "auto", "Qwen2ForCausalLM"),
        (write_llama_with_biases, 28, "auto", "LlamaForCausalLM"),
        (write_qwen3, 30, "auto", "Qwen3ForCausalLM"),
    ],
)
def test_the_class_follows_the_width_and_the_flag(
    tmp_path: Path, write: Callable, hidden: int, arch: Arch, architecture: str
) -> None:
    write(tmp_path)
    assert student_family(describe_teacher(tmp_path), hidden, arch).architecture == architecture


@pytest.mark.parametrize(
    ("write", "hidden", "arch", "words"),
    [
        (write_llama, 30, "native", "no multiple of its heads .4.. Use --arch auto"),
        (write_qwen2, 30, "llama", "no multiple of its heads .4.. Use --arch auto"),
        (write_qwen3, 28, "llama", "no place for what Qwen3ForCausalLM has .k_norm, q_norm.. Use --arch native"),
    ],
)
def test_a_class_that_cannot_hold_the_student_is_refused(
    tmp_path: Path, write: Callable, hidden: int, arch: Arch, words: str
) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match=words):
        student_family(describe_teacher(tmp_path), hidden, arch)


def test_a_student_with_fewer_layers_says_what_its_own_layers_have(tmp_path: Path) -> None:
    """Read back it is a model of its own, whose layers are as they were in training."""
    write_smollm3(tmp_path / "teacher", num_layers=4)
    teacher = describe_teacher(tmp_path / "teacher")
    assert (teacher.shape.unrotated_layers, teacher.shape.windowed_layers) == ((1, 3), (3,))
    shape = replace(teacher.shape, num_layers=2, teacher_layers=(0, 3))
    values = student_config(teacher, shape, student_family(teacher, 48), dtype=torch.float32)
    assert values["no_rope_layers"] == [1, 0]
    assert values["layer_types"] == ["full_attention", "sliding_attention"]
    (tmp_path / "student").mkdir()
    (tmp_path / "student/config.json").write_text(json.dumps(dict(values)))
    assert describe_teacher(tmp_path / "student", needs_weights=False).shape == shape.without_teacher()


def test_no_class_without_windows_is_chosen_for_a_student_with_them(tmp_path: Path) -> None:
    write_qwen2_with_windows(tmp_path)
    teacher = describe_teacher(tmp_path)
    assert student_family(teacher, 28).architecture == "Qwen2ForCausalLM"  # otherwise Llama, for its narrow heads
    with pytest.raises(ConfigError, match="has no place for what Qwen2ForCausalLM has .sliding windows.. Use"):
        student_family(teacher, 28, "llama")


def test_mistral_computes_what_llama_computes(tmp_path: Path, teacher: TeacherDescription) -> None:
    """The same weights under both classes give the same logits, RoPE scaling included."""
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    output = tmp_path / "student"
    export_student(teacher=teacher, projections=projections, norms=norms, student_hidden_size=28, output=output)
    as_llama = logits_of(load(output))
    values = json.loads((output / "config.json").read_text())
    values |= {"architectures": [MISTRAL.architecture], "model_type": MISTRAL.model_type, "sliding_window": None}
    (output / "config.json").write_text(json.dumps(values))
    as_mistral = load(output)
    assert type(as_mistral).__name__ == MISTRAL.architecture
    assert torch.equal(logits_of(as_mistral), as_llama)


def test_config_says_the_same_to_readers_of_either_spelling(tmp_path: Path, teacher: TeacherDescription) -> None:
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    output = tmp_path / "student"
    export_student(teacher=teacher, projections=projections, norms=norms, student_hidden_size=28, output=output)
    values = json.loads((output / "config.json").read_text())
    assert values["rope_parameters"] == {"rope_theta": values["rope_theta"], **values["rope_scaling"]} == LLAMA3_ROPE
    assert values["dtype"] == values["torch_dtype"] == "float32"


@pytest.mark.parametrize("hidden", [28, 30])
def test_nothing_is_left_to_the_defaults_of_a_class(teacher: TeacherDescription, hidden: int) -> None:
    """A Llama 2 config.json leaves out what was Llama's default then; head_dim would follow the new hidden size."""
    implied = ("head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "bos_token_id")
    left = {name: value for name, value in teacher.config_values.items() if name not in implied}
    shape = replace(teacher.shape, hidden_size=hidden)
    family = student_family(teacher, hidden)
    values = student_config(replace(teacher, config_values=left), shape, family, dtype=torch.float32)
    assert values == student_config(teacher, shape, family, dtype=torch.float32)
    assert {name: values[name] for name in implied} == {
        "head_dim": 16,
        "num_key_value_heads": 2,
        "rms_norm_eps": 3e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
    }


def test_model_card_names_teacher_width_and_tokens(teacher: TeacherDescription) -> None:
    card = model_card(
        base=teacher,
        family=MISTRAL,
        shape=replace(teacher.shape, hidden_size=30),
        suffix="LRC",
        origin="made with Low-Rank Clone.",
        licence="The teacher's licence applies.",
        tags=["low-rank-clone"],
        tokens=1_234_567,
        steps=89,
        losses={"lm_loss": 3.25},
        settings=["lr: 0.001"],
    )
    for words in (
        "| lm loss, held out | 3.2500 |",
        "lr: 0.001",
        "# teacher-LRC-30\n",
        "A language model of hidden size 30, made with Low-Rank Clone.\n",
        "- low-rank-clone\n",
        "1,234,567",
        "| 89 |",
        "MistralForCausalLM",
        "untied",
    ):
        assert words in card


def test_student_of_a_qwen2_that_leaves_head_dim_out_keeps_its_heads(tmp_path: Path) -> None:
    """As published Qwen2 configs do: by itself, transformers would take the student's hidden size over the heads."""
    write_qwen2(tmp_path / "teacher", head_dim=None)
    description = describe_teacher(tmp_path / "teacher")
    assert "head_dim" not in description.config_values
    projections, norms = random_student(description, 20, has_lm_head=True)
    output = tmp_path / "student"
    export_student(teacher=description, projections=projections, norms=norms, student_hidden_size=20, output=output)
    attention = load(output).model.layers[1].self_attn
    assert attention.head_dim == 12 and attention.q_proj.weight.shape == (48, 20)
