"""No field of config.json that transformers computes with is ignored: it is read, or refused by its name."""

import ast
import inspect
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from damage import change_config
from hf_teachers import (
    write_gemma2,
    write_gemma3,
    write_granite,
    write_llama,
    write_mistral,
    write_olmo2,
    write_olmo3,
    write_phi3,
    write_qwen2,
    write_qwen3,
    write_smollm3,
)
from megatron_lrc.hf import config_fields
from megatron_lrc.hf.architectures import Family
from megatron_lrc.hf.config_fields import unknown_fields
from megatron_lrc.hf.families import describe_teacher
from students import TOKENS

#: Of a config: which kernels compute, by way of `load_pretrained` always torch's.
CHOOSES_KERNELS = {"_attn_implementation", "_experts_implementation"}
#: Of the config of Gemma 3's class for images, in the same file.
OF_IMAGES = {"image_token_id", "mm_tokens_per_image", "text_config"}


CLASSES = [write_llama, write_mistral, write_qwen2, write_qwen3, write_smollm3, write_granite, write_phi3, write_olmo2]
CLASSES += [write_olmo3, write_gemma2, write_gemma3]


@pytest.fixture(params=CLASSES)
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    request.param(tmp_path, num_layers=2)
    return tmp_path


def test_whatever_transformers_reads_of_a_config_is_accounted_for(teacher: Path) -> None:
    """By the source of the model's class and of its masks: names of attributes of a config."""
    description = describe_teacher(teacher)
    model = sys.modules[AutoModelForCausalLM._model_mapping[type(description.hf_config)].__module__]
    accounted_for = {*config_fields._READ, *config_fields._WITHOUT_EFFECT, *config_fields._UNDECLARED}
    accounted_for |= {*description.family.fields, *CHOOSES_KERNELS, *config_fields.FOREIGN_FEATURES, *OF_IMAGES}
    declared = {field.name for field in fields(description.hf_config)}
    methods = {name for name in dir(type(description.hf_config)) if name not in declared}
    for module in (model, masking_utils):
        found = attributes_of_config(inspect.getsource(module)) - methods
        unaccounted = {name for name in found - accounted_for if name in declared or module is model}
        assert not unaccounted, (module.__name__, unaccounted)


def attributes_of_config(source: str) -> set[str]:
    """What is read of a variable or attribute that is called config, also by getattr."""

    def is_config(node: ast.AST) -> bool:
        return "config" in (getattr(node, "id", ""), getattr(node, "attr", ""))

    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and is_config(node.args[0]):
            names.add(getattr(node.args[1], "value", ""))
    return names - {""}


def test_a_field_that_no_declaration_knows_is_refused_by_its_name(teacher: Path, monkeypatch) -> None:
    """Each field of the class in turn, as if it had come with a newer transformers: nobody has declared it."""
    description = describe_teacher(teacher)
    bare = Family("bare", description.family.architecture, description.family.model_type)
    monkeypatch.setattr(config_fields, "_READ", set())
    monkeypatch.setattr(config_fields, "_WITHOUT_EFFECT", set())
    plain = type(description.hf_config)()
    assert not list(unknown_fields(bare, plain, {}))
    for name in {field.name for field in fields(plain)} - {"rope_parameters", bare.activation[0]}:
        default, changed = getattr(plain, name), type(plain)()
        object.__setattr__(changed, name, not default if isinstance(default, bool) else 3)
        (found,) = unknown_fields(bare, changed, {})
        assert found.startswith(f"{name}: "), found


def test_what_is_said_to_have_no_effect_has_none(teacher: Path) -> None:
    """All those fields at once, at other values."""
    expected = logits_of_directory(teacher)
    changes = {"initializer_range": 0.7, "attention_dropout": 0.5, "pretraining_tp": 3, "use_cache": False}
    changes |= {"bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 9, "chunk_size_feed_forward": 1}
    changes |= {"is_encoder_decoder": False, "output_hidden_states": True, "problem_type": "regression"}
    assert changes.keys() <= config_fields._WITHOUT_EFFECT
    change_config(teacher, **changes)
    describe_teacher(teacher)
    assert torch.equal(logits_of_directory(teacher), expected)


def logits_of_directory(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, config=AutoConfig.from_pretrained(directory)).eval()
    with torch.no_grad():
        return model(TOKENS).logits
