"""A run goes on from a training checkpoint of the released code: its student is the one that code makes of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from config_cases import change
from damage import change_config, change_weights
from hf_teachers import write_llama, write_qwen2
from megatron_lrc.config import ConfigError, ModelShape
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.released_projections import ReleasedProjections
from megatron_lrc.methods import method_of
from megatron_lrc.train.start_checks import check
from released_checkpoints import Switches, merged, write_released
from runs import continued, make_config, on_layout, records, train
from tools_path import convert_to_hf

WIDTH, EPSILON = 24, 1e-5


def released_config(teacher: Path, released: Path, data: str, run: Path, **changes: object):
    config = make_config(str(teacher), data, run, steps=0)
    change(config, init="released", released_checkpoint=str(released), student_norm_epsilon=EPSILON, **changes)
    return config


def assert_is_the_released_codes_student(run: Path, teacher: Path, released: Path, switches: Switches) -> None:
    assert convert_to_hf(["--load", str(run), "--output", str(run / "hf"), "--no-verify"]) == 0
    found = load_file(run / "hf/model.safetensors")
    expected = merged(str(teacher), load_file(released / "model.safetensors"), switches)
    if switches.tie_word_emb_proj:
        del expected["lm_head.weight"]  # which is the embedding
    for name in expected.keys() | found.keys():  # where another class has biases, they are zero
        wanted = expected.get(name, torch.zeros_like(found[name]))
        torch.testing.assert_close(found[name], wanted.float(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.distributed
def test_llama_with_a_projection_for_each_matrix(tmp_path, tiny_text):
    write_llama(tmp_path / "teacher")
    released = write_released(tmp_path / "released", str(tmp_path / "teacher"), WIDTH, Switches())
    config = released_config(tmp_path / "teacher", released, tiny_text, tmp_path / "run")
    train(on_layout(config, tp=2), 2)
    assert_is_the_released_codes_student(tmp_path / "run", tmp_path / "teacher", released, Switches())


@pytest.mark.distributed
def test_tied_qwen2_whose_matrices_share_projections(tmp_path, tiny_text):
    write_qwen2(tmp_path / "teacher", is_tied=True)
    switches = Switches(all_attn=False, in_out_mlp=True, tie_word_emb_proj=True)
    released = write_released(tmp_path / "released", str(tmp_path / "teacher"), WIDTH, switches)
    config = released_config(tmp_path / "teacher", released, tiny_text, tmp_path / "run")
    train(on_layout(config, pp=2), 2)
    assert_is_the_released_codes_student(tmp_path / "run", tmp_path / "teacher", released, switches)


@pytest.mark.distributed
def test_fewer_layers_and_going_on_when_the_checkpoint_is_gone(tmp_path, tiny_text):
    write_llama(tmp_path / "teacher", is_tied=True, num_layers=3)
    switches = Switches(del_layers=(1,), align=True)
    released = write_released(tmp_path / "released", str(tmp_path / "teacher"), WIDTH, switches)
    changes = {"student_layers": ["0", "2"], "untie_embeddings_and_output_weights": True}
    config = released_config(tmp_path / "teacher", released, tiny_text, tmp_path / "run", **changes)
    train(config)
    assert_is_the_released_codes_student(tmp_path / "run", tmp_path / "teacher", released, switches)
    shutil.rmtree(released)
    train(continued(config, steps=1))
    assert records(tmp_path / "run")[-1]["step"] == 1


@pytest.fixture
def pair(tmp_path) -> tuple[Path, ModelShape, ModelShape]:
    """A checkpoint, and the shapes of its teacher and student."""
    write_llama(tmp_path / "teacher")
    released = write_released(tmp_path / "released", str(tmp_path / "teacher"), WIDTH, Switches())
    config = released_config(tmp_path / "teacher", released, "data", tmp_path / "run")
    teacher = describe_teacher(str(tmp_path / "teacher")).shape
    return released, teacher, method_of(config).student_shape(teacher)


def add(released: Path, name: str) -> None:
    change_weights(released, lambda tensors: tensors.update({name: torch.ones(3)}))


def drop(released: Path, name: str) -> None:
    change_weights(released, lambda tensors: tensors.pop(name))


def cut_off(released: Path) -> None:
    data = (released / "model.safetensors").read_bytes()
    (released / "model.safetensors").write_bytes(data[: len(data) // 2])


def make_a_student(released: Path) -> None:
    values = json.loads((released / "config.json").read_text())
    del values["target_hidden_size"]
    (released / "config.json").write_text(json.dumps(values))


REFUSED = {
    "other width": (lambda at: change_config(at, target_hidden_size=32), "32 wide: give --student-hidden-size that"),
    "other epsilon": (lambda at: change_config(at, target_rms_norm_eps=1e-6), "1e-06: give --student-norm-epsilon"),
    "other teacher": (lambda at: change_config(at, vocab_size=999), "had vocab_size 999, --teacher has 301"),
    "no such checkpoint": (make_a_student, "is no training checkpoint of the released LRC code"),
    "no config.json": (lambda at: (at / "config.json").unlink(), "has no config.json that can be read"),
    "unknown tensor": (lambda at: add(at, "model.layers.0.self_attn.student_attn.q_proj.weight"), "no projection of"),
    "layer left out": (lambda at: drop(at, "model.layers.1.mlp.zoom_down.weight"), "--student-layers"),
    "other shape": (lambda at: (drop(at, "zoom_down.weight"), add(at, "zoom_down.weight")), r"has shape \[3\], exp"),
    "cut off": (cut_off, "is not a complete safetensors file"),
}


@pytest.mark.parametrize("damage, message", REFUSED.values(), ids=REFUSED)
def test_another_checkpoint_is_refused_in_a_sentence(pair, damage, message):
    released, *shapes = pair
    ReleasedProjections(released, *shapes)
    damage(released)
    with pytest.raises(ConfigError, match=message):
        ReleasedProjections(released, *shapes)


def test_values_that_are_not_finite_are_refused(pair):
    released, *shapes = pair
    tensors = load_file(released / "model.safetensors")
    tensors["model.layers.1.self_attn.zoom_k.weight"][3, 4] = torch.nan
    save_file(tensors, released / "model.safetensors")
    opened = ReleasedProjections(released, *shapes)
    with pytest.raises(ConfigError, match=r"zoom_k.weight holds values that are not finite"):
        for name in opened.names():
            opened.read(name)


def test_it_is_looked_at_before_anything_is_built_and_a_tied_student_is_told_of_its_head(tmp_path, tiny_text):
    write_llama(tmp_path / "teacher", is_tied=True)
    released = write_released(tmp_path / "released", str(tmp_path / "teacher"), WIDTH, Switches())
    config = released_config(tmp_path / "teacher", released, tiny_text, tmp_path / "run")
    with pytest.raises(ConfigError, match="Add --untie-embeddings-and-output-weights"):
        check(config, 1)


FLAGS = {
    "no path": ({"init": "released"}, "--init released needs --released-checkpoint"),
    "no init": ({"released_checkpoint": "x"}, "--released-checkpoint x is only for --init released"),
}


@pytest.mark.parametrize("values, message", FLAGS.values(), ids=FLAGS)
def test_one_flag_without_the_other_is_refused(tmp_path, values, message):
    write_llama(tmp_path / "teacher")
    config = make_config(str(tmp_path / "teacher"), "data", tmp_path / "run", steps=1)
    change(config, **values)
    assert any(message in error for error in method_of(config).check_models())
