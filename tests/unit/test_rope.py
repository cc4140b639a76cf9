"""RoPE as config.json gives it: transformers' frequencies bit for bit at any length; what is refused; spellings."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Olmo3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

from damage import change_config
from hf_teachers import (
    LLAMA3_ROPE,
    LONG_ROPE,
    ORIGINAL_CONTEXT,
    ROTATED,
    YARN_ROPE,
    write_llama,
    write_phi3,
    write_phi3_with_longrope,
    write_qwen2_with_windows,
    write_qwen2_with_yarn,
)
from megatron_lrc.clone.rotation import Rotation
from megatron_lrc.commands.main import main
from megatron_lrc.config import ConfigError
from megatron_lrc.hf.architectures import QWEN2, ROPE_TYPES
from megatron_lrc.hf.families import TeacherDescription, describe_teacher
from megatron_lrc.hf.layer_attributes import FULL, SLIDING
from megatron_lrc.hf.rope import check_rope, rope_fields, rotations
from megatron_lrc.hf.student_config import student_config, student_family
from students import export_student, load, logits_of, random_student
from tiny_data import write_dataset

FACTORS = {"short_factor": [1.0 + 0.1 * pair for pair in range(8)], "long_factor": [1.5 + pair for pair in range(8)]}
LLAMA_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8, **FACTORS}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": LLAMA3_ROPE,
    "yarn": YARN_ROPE,
    "yarn with mscale": YARN_ROPE | {"mscale": 0.8, "mscale_all_dim": 0.4, "factor": None},
    "yarn with a factor": YARN_ROPE | {"attention_factor": 0.7},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.3},
    "longrope": LLAMA_LONGROPE,
    "longrope with a factor": LLAMA_LONGROPE | {"attention_factor": 1.25, "factor": 4.0},
}


def rotation_of_transformers(config: Any, length: int) -> tuple[Tensor, float]:
    """Of the class's own module, after a forward pass over so many positions."""
    model = sys.modules[AutoModelForCausalLM._model_mapping[type(config)].__module__]
    (rotary_class,) = [value for name, value in vars(model).items() if name.endswith("RotaryEmbedding")]
    rotary = rotary_class(config)
    rotary(torch.zeros(1), torch.arange(length)[None])
    return rotary.inv_freq, rotary.attention_scaling


def assert_same(rotation: Rotation, expected: tuple[Tensor, float]) -> None:
    assert rotation.frequencies.dtype == torch.float32
    assert torch.equal(rotation.frequencies, expected[0]) and rotation.factor == expected[1]


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_and_factors_are_those_of_transformers_bit_for_bit(tmp_path: Path, rope: str) -> None:
    """Within, at and beyond the original context and max_position_embeddings (256)."""
    write_llama(tmp_path, rope=ROPES[rope])
    found = {}
    for length in (3, 8, 9, 256, 257, 1000):
        description = describe_teacher(tmp_path)
        of_layers = rotations(description, length)
        found[length] = of_layers.full.frequencies
        assert not of_layers.differ
        assert_same(of_layers.full, rotation_of_transformers(describe_teacher(tmp_path).hf_config, length))
    changes = [not torch.equal(found[before], found[after]) for before, after in ((8, 9), (256, 257), (257, 1000))]
    by_length = {"dynamic": [False, True, True], "longrope": [True, False, False]}
    assert changes == by_length.get(rope.split()[0], [False] * 3)
    assert {name.split()[0] for name in ROPES} == set(ROPE_TYPES)


@pytest.mark.parametrize("write", [write_phi3, *ROTATED])
def test_those_of_other_classes_and_parts_of_heads_are_too(tmp_path: Path, write: Callable) -> None:
    write(tmp_path)
    for length in (ORIGINAL_CONTEXT, ORIGINAL_CONTEXT + 1):
        found = rotations(describe_teacher(tmp_path), length).full
        assert_same(found, rotation_of_transformers(describe_teacher(tmp_path).hf_config, length))
    rotated = {write_phi3: 12, write_phi3_with_longrope: 6}.get(write, 16)
    assert 2 * len(found.frequencies) == rotated


SCALING = {"rope_type": "linear", "factor": 8.0}
YARN_SCALING = {name: value for name, value in YARN_ROPE.items() if name not in ("rope_theta", "truncate")}
TYPES = [SLIDING, SLIDING, FULL]
#: config.json in the older spelling, its class, the class's module, and the older field for the base of sliding layers.
BY_LAYER = {
    "Gemma 3": (
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": SCALING},
        Gemma3TextConfig,
        Gemma3RotaryEmbedding,
        "rope_local_base_freq",
    ),
    "OLMo 3": ({"rope_theta": 5e5, "rope_scaling": YARN_SCALING}, Olmo3Config, Olmo3RotaryEmbedding, ""),
}


def described(base: TeacherDescription, config_class: type, values: dict, base_field: str) -> TeacherDescription:
    """A teacher of such a config, as far as RoPE is concerned. Its values are copied: transformers changes them."""
    family = replace(QWEN2, rope_by_layer=True, sliding_base_field=base_field)
    config = config_class(head_dim=16, layer_types=TYPES, num_hidden_layers=3, **json.loads(json.dumps(values)))
    return replace(base, family=family, hf_config=config, config_values=values)


@pytest.mark.parametrize("name", BY_LAYER)
def test_layers_with_windows_have_their_own_rotation(tmp_path: Path, name: str) -> None:
    """Read from the older spelling, written in both, and read again from either alone."""
    values, config_class, rotary_class, base_field = BY_LAYER[name]
    write_llama(tmp_path)
    teacher = described(describe_teacher(tmp_path), config_class, values, base_field)
    check_rope(teacher)
    written = rope_fields(teacher, teacher.family)
    newer = {"rope_parameters": written["rope_parameters"]}
    older = {field: value for field, value in written.items() if field not in newer}
    assert older == values
    for fields in (values, written, older, newer):
        again = described(teacher, config_class, fields, base_field)
        rotary, found = rotary_class(again.hf_config), rotations(again, 40)
        assert found.differ
        for kind, rotation in ((FULL, found.full), (SLIDING, found.sliding)):
            expected = getattr(rotary, f"{kind}_inv_freq"), getattr(rotary, f"{kind}_attention_scaling")
            assert_same(rotation, expected)
        assert not torch.equal(found.full.frequencies, found.sliding.frequencies)
        assert (found.full.factor > 1.1) == (name == "OLMo 3") and found.sliding.factor == 1.0


def test_each_layer_of_a_student_has_the_rotation_of_its_kind(tmp_path: Path) -> None:
    write_qwen2_with_windows(tmp_path, num_layers=4)
    shape = replace(describe_teacher(tmp_path).shape, windowed_layers=(1, 2))
    values, config_class, _, base_field = BY_LAYER["Gemma 3"]
    found = rotations(described(describe_teacher(tmp_path), config_class, values, base_field), 16)
    student = replace(shape, num_layers=3, teacher_layers=(0, 2, 3))
    assert [found.of_layer(shape, layer) is found.sliding for layer in range(4)] == [False, True, True, False]
    assert [found.of_layer(student, layer) is found.sliding for layer in range(3)] == [False, True, False]


def test_rope_by_layer_without_that_of_a_kind_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path)
    nested = {FULL: {"rope_type": "default", "rope_theta": 1e4}}
    config = Gemma3TextConfig(head_dim=16, layer_types=TYPES, num_hidden_layers=3)
    config.rope_parameters = nested
    family = replace(QWEN2, rope_by_layer=True)
    with pytest.raises(ConfigError, match="no rope_parameters of layers of type sliding_attention"):
        check_rope(replace(describe_teacher(tmp_path), family=family, hf_config=config))


def without(settings: dict, *names: str) -> dict:
    return {name: value for name, value in settings.items() if name not in names}


PARTIAL_LONGROPE = LONG_ROPE | {"original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("write", "rope", "words"),
    [
        (write_llama, {"rope_type": "proportional", "rope_theta": 1e4}, "RoPE type 'proportional'. Llama teachers are"),
        (write_llama, LLAMA3_ROPE | {"rope_theta": 0.0}, "rope_theta 0.0.* above 0"),
        (write_llama, LLAMA3_ROPE | {"factor": float("nan")}, "factor nan.* above 0"),
        (write_llama, YARN_ROPE | {"factor": -1.0}, "factor -1.0.* above 0"),
        (write_llama, YARN_ROPE | {"attention_factor": 0.0}, "attention_factor 0.0.* above 0"),
        (write_llama, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 0.0}, "factor 0.0.* above 0"),
        (write_llama, {"rope_type": "linear", "rope_theta": 1e4, "factor": None}, "factor None.* above 0"),
        (write_llama, YARN_ROPE | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, and LlamaForCausalLM"),
        (write_llama, without(YARN_ROPE, "original_max_position_embeddings"), "'yarn' without original_max_position_"),
        (write_llama, without(LLAMA3_ROPE, "original_max_position_embeddings"), "'llama3' without original_max_pos"),
        (write_llama, LLAMA_LONGROPE | {"long_factor": [1.0] * 7}, "long_factor of 7 values. 8 numbers above 0"),
        (
            write_llama,
            LLAMA_LONGROPE | {"short_factor": [1.0] * 7 + [0.0]},
            "short_factor of 8 values. 8 numbers above",
        ),
        (write_llama, LLAMA_LONGROPE | {"original_max_position_embeddings": 1}, "transformers cannot compute with"),
        (write_llama, ROPES["linear"] | {"rope_theta": 1e-60}, "transformers cannot compute with.*finite frequencies"),
        (write_llama, without(YARN_ROPE, "factor"), "transformers refuses config.json"),
        (write_phi3_with_longrope, PARTIAL_LONGROPE | {"long_factor": [1.0] * 4}, "transformers refuses config.json"),
        (write_phi3, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "transformers refuses config.json"),
        (write_phi3, {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.5}, "factor 1.5 of heads"),
        (write_phi3, {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.1}, "factor 0.1 of heads"),
        (
            write_qwen2_with_windows,
            {FULL: YARN_ROPE, SLIDING: YARN_ROPE},
            "rope_parameters by type of layer.*of all lay",
        ),
    ],
)
def test_bad_settings_are_refused_in_one_line(tmp_path: Path, write: Callable, rope: dict, words: str) -> None:
    write(tmp_path)
    change_config(tmp_path, rope_parameters=rope)
    with pytest.raises(ConfigError, match=words) as caught:
        describe_teacher(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("rope", ["llama3", "yarn", "longrope"])
def test_the_older_spelling_is_understood(tmp_path: Path, rope: str, outside: bool) -> None:
    """With the original context in rope_scaling, or beside it."""
    write_llama(tmp_path, rope=ROPES[rope])
    expected = rotations(describe_teacher(tmp_path), 16).full
    values = json.loads((tmp_path / "config.json").read_text())
    settings = values.pop("rope_parameters")
    scaling = {"type": settings["rope_type"], **without(settings, "rope_type", "rope_theta")}
    values |= {"rope_theta": settings["rope_theta"], "rope_scaling": scaling}
    if outside:
        name = "original_max_position_embeddings"
        values[name] = scaling.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_same(rotations(describe_teacher(tmp_path), 16).full, (expected.frequencies, expected.factor))


@pytest.mark.parametrize("spelling", ["rope_parameters", "older"])
@pytest.mark.parametrize("write", [write_phi3, *ROTATED])
def test_a_students_config_says_the_same_in_either_spelling(tmp_path: Path, write: Callable, spelling: str) -> None:
    write(tmp_path)
    teacher = describe_teacher(tmp_path)
    family = student_family(teacher, 48)
    values = dict(student_config(teacher, teacher.shape, family, dtype=torch.float32))
    older = ("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings")
    for name in ("rope_parameters",) if spelling == "older" else (name for name in older if name in values):
        if not (name == older[-1] and "phi3" in family.model_type):  # of Phi-3 it is a field in both spellings
            del values[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    for length in (8, 9, 40):
        expected = rotations(teacher, length).full
        assert_same(rotations(describe_teacher(tmp_path), length).full, (expected.frequencies, expected.factor))


WHOLE_LONGROPE = LONG_ROPE | {"partial_rotary_factor": 1.0, **{name: factors[:6] for name, factors in FACTORS.items()}}


def test_a_narrower_phi3_with_longrope_is_written_as_mistral_and_computes_the_same(tmp_path: Path) -> None:
    """transformers' Phi-3 would want factors for heads of hidden size / heads features."""
    write_phi3_with_longrope(tmp_path / "teacher", rope=WHOLE_LONGROPE)
    teacher = describe_teacher(tmp_path / "teacher")
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    output = tmp_path / "student"
    export_student(teacher=teacher, projections=projections, norms=norms, student_hidden_size=28, output=output)
    student = load(output)
    assert type(student).__name__ == "MistralForCausalLM" and student.config.head_dim == 12
    for length in (8, 9):
        expected = rotations(teacher, length).full
        again = describe_teacher(output)
        assert_same(rotations(again, length).full, (expected.frequencies, expected.factor))
        assert_same(rotations(again, length).full, rotation_of_transformers(load(output).config, length))
    assert logits_of(student).isfinite().all()
    with pytest.raises(
        ConfigError, match="hidden size / heads .28 / 4. is not the size of its heads .12.. Use --arch a"
    ):
        student_family(teacher, 28, "native")


def test_a_narrower_student_that_no_class_can_hold_is_refused(tmp_path: Path) -> None:
    write_phi3_with_longrope(tmp_path)
    teacher = describe_teacher(tmp_path)
    with pytest.raises(
        ConfigError, match="--student-hidden-size 28.*No other class.*Use --student-hidden-size 48, or wi"
    ):
        student_family(teacher, 28)
    assert student_family(teacher, 24, num_heads=2) is teacher.family  # 12 features for each of fewer heads


def test_yarn_of_qwen2_stays_when_it_is_written_as_llama(tmp_path: Path) -> None:
    write_qwen2_with_yarn(tmp_path / "teacher")
    teacher = describe_teacher(tmp_path / "teacher")
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    for arch in ("auto", "native"):
        export_student(
            teacher=teacher,
            projections=projections,
            norms=norms,
            student_hidden_size=28,
            output=tmp_path / arch,
            arch=arch,  # type: ignore[arg-type]
        )
    as_llama, as_qwen2 = load(tmp_path / "auto"), load(tmp_path / "native")
    assert type(as_llama).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits_of(as_llama), logits_of(as_qwen2))


@pytest.mark.parametrize(
    ("hidden", "code", "words"), [("48", 0, "parameters"), ("28", 2, "No other class rotates part")]
)
def test_a_dry_run_says_what_a_student_takes_or_that_no_class_can_hold_it(
    tmp_path: Path, capsys, hidden: str, code: int, words: str
) -> None:
    write_phi3_with_longrope(tmp_path / "teacher")
    data = write_dataset(tmp_path / "text", [[number % 90 + 5 for number in range(400)]] * 20)
    flags = f"--teacher {tmp_path / 'teacher'} --student-hidden-size {hidden} --data-path {data} --split 90,10,0 "
    flags += "--seq-length 16 --micro-batch-size 2 --global-batch-size 8 --train-iters 4 --eval-iters 0 --dry-run 1"
    assert main(["train", *flags.split()]) == code
    assert words in "".join(capsys.readouterr())
