"""A teacher that changed by a single bit is another one: to a run that goes on, to an export, to a verification.

The changes lie between the samples that earlier versions took of the files, so those versions accepted them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints import write_run
from convert_tool import convert, refused_conversion
from damage import change_config, change_weights
from hf_teachers import write_llama
from megatron_lrc.checkpoints.run_directory import publish, read_state
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.constant_tensors import spans_of
from megatron_lrc.hf.content_hash import PREFIX, hash_files
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.hash_cache import CACHE_FILE, FileState, cache_text
from megatron_lrc.hf.sampled_hash import sampled_files
from megatron_lrc.hf.shared_hash import contents_at_start
from megatron_lrc.train.start_checks import check
from runs import make_config
from students import random_student
from tools_path import convert_to_hf, tool_main

HIDDEN = 24
verify_model = tool_main("verify_model")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher whose files are large enough for bytes between the samples, and what it was converted to."""
    folder = tmp_path_factory.mktemp("pair")
    write_llama(folder / "source", num_layers=8, dtype=torch.float64)
    convert(folder / "source", folder / "converted", "--no-verify")
    return folder / "source", folder / "converted"


@pytest.fixture
def source(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the Hugging Face directory, to change."""
    return Path(shutil.copytree(pair[0], tmp_path / "source"))


@pytest.fixture
def converted(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "converted"))


def weights(directory: Path) -> Path:
    return directory / "model.safetensors"


def flip_a_bit(path: Path, first: int, end: int) -> None:
    change_bytes(path, first, end, lambda data: bytes([data[0] ^ 1]) + data[1:])


def negate(path: Path, first: int, end: int) -> None:
    """The sign is in the last byte of each number."""
    change_bytes(path, first, end, lambda data: bytes(b ^ 0x80 if i % 8 == 7 else b for i, b in enumerate(data)))


def zero(path: Path, first: int, end: int) -> None:
    change_bytes(path, first, end, lambda data: bytes(len(data)))


def change_bytes(path: Path, first: int, end: int, change: Callable[[bytes], bytes]) -> None:
    with open(path, "r+b") as file:
        file.seek(first)
        data = file.read(end - first)
        file.seek(first)
        file.write(change(data))


def a_matrix_between_the_samples(directory: Path) -> tuple[int, int]:
    """Where it lies in the file: in the second quarter."""
    path = weights(directory)
    size = path.stat().st_size
    span = next(span for span in spans_of(path) if span.start > size / 4 and len(span.shape) == 2)
    assert span.end < size / 2 - 65536
    return span.start, span.end


def fingerprint(directory: Path) -> str:
    return open_teacher(describe_teacher(directory)).fingerprint()


@pytest.mark.parametrize("change", [flip_a_bit, negate, zero])
def test_a_change_that_no_sample_sees_makes_another_teacher(source: Path, change: Callable) -> None:
    before, sampled = fingerprint(source), open_teacher(describe_teacher(source)).sampled_fingerprint()
    change(weights(source), *a_matrix_between_the_samples(source))
    reader = open_teacher(describe_teacher(source))
    assert reader.sampled_fingerprint() == sampled and reader.fingerprint() != before


@pytest.mark.parametrize("change", [flip_a_bit, negate, zero])
def test_a_converted_teacher_with_a_change_that_no_sample_sees_is_refused(converted: Path, change: Callable) -> None:
    path = converted / "release/__0_0.distcp"
    spacing = (path.stat().st_size - 65536) // 15
    files = {path.name: path.stat().st_size}
    before = sampled_files(path.parent, files)
    change(path, 4 * spacing + 65536 + 8, 5 * spacing - 8)
    assert sampled_files(path.parent, files) == before
    with pytest.raises(ConfigError, match="__0_0.distcp in release/ are not what the conversion wrote"):
        fingerprint(converted)


# ---- a run that goes on ----


def write_student(run: Path, teacher: Path) -> Path:
    """A checkpoint of a student of this teacher."""
    description = describe_teacher(teacher)
    return write_run(run, description, *random_student(description, HIDDEN, has_lm_head=True))


def to_go_on(run: Path, teacher: Path, text: str) -> Config:
    config = make_config(str(teacher), text, run, steps=5)
    config.model.untie_embeddings_and_output_weights = True
    config.checkpoint.load = str(run)
    return config


def test_a_run_does_not_go_on_with_a_changed_teacher(source: Path, tmp_path: Path, tiny_text: str) -> None:
    write_student(tmp_path / "run", source)
    config = to_go_on(tmp_path / "run", source, tiny_text)
    state = check(config, 1).state
    assert state.step == 3 and state.teacher_fingerprint == fingerprint(source)
    flip_a_bit(weights(source), *a_matrix_between_the_samples(source))
    with pytest.raises(ConfigError, match=f"--teacher {source} is not the teacher that .*iter_0000003"):
        check(config, 1)


def test_a_run_goes_on_with_either_form_of_its_teacher(pair: tuple[Path, Path], tmp_path: Path, tiny_text: str) -> None:
    write_student(tmp_path / "run", pair[0])
    checked = check(to_go_on(tmp_path / "run", pair[1], tiny_text), 1)
    assert checked.state.teacher_fingerprint == fingerprint(pair[0]) and checked.warnings == []


def as_start_of_ordinary_training(config: Config) -> Config:
    config.model.method, config.model.student, config.model.teacher = "ordinary", config.model.teacher, None
    config.model.student_hidden_size = None
    return config


@pytest.mark.parametrize("form", [0, 1], ids=["Hugging Face", "converted"])
def test_ordinary_training_begins_without_a_warning(pair, tmp_path: Path, tiny_text: str, form: int) -> None:
    config = as_start_of_ordinary_training(make_config(str(pair[form]), tiny_text, tmp_path / "run", steps=1))
    checked = check(config, 1)
    assert checked.warnings == [] and checked.reader.fingerprint(checked.contents) == fingerprint(pair[0])


def test_a_new_run_does_not_start_from_a_changed_conversion(converted: Path, tmp_path: Path, tiny_text: str) -> None:
    """Whether it is the teacher, or what ordinary training begins with."""
    zero(converted / "release/__0_0.distcp", 400_000, 400_100)
    config = make_config(str(converted), tiny_text, tmp_path / "run", steps=1)
    with pytest.raises(ConfigError, match="are not what the conversion wrote"):
        check(config, 1)
    config = as_start_of_ordinary_training(config)
    with pytest.raises(ConfigError, match=f"--student {converted}: .* are not what the conversion wrote"):
        check(config, 1)


# ---- an export and a verification ----


def test_an_export_reads_the_files_whatever_is_remembered(source: Path, tmp_path: Path, capsys) -> None:
    """A bit that flips on the disk changes no time of the file: what is remembered of it stays right in all else."""
    run, path = tmp_path / "run", weights(source)
    write_student(run, source)
    before = hash_files([path])[path]
    flip_a_bit(path, *a_matrix_between_the_samples(source))
    entry = [FileState.of(path).key, [chunk.to_list() for chunk in before.chunks]]
    (source / CACHE_FILE).write_text(cache_text([entry]))
    assert contents_at_start(source, [path]) == {path: before}
    assert convert_to_hf(["--load", str(run), "--output", str(tmp_path / "student"), "--no-verify"]) == 2
    assert "is not the teacher that" in capsys.readouterr().err and not (tmp_path / "student").exists()
    assert verify_model([str(run), str(run)]) == 2
    assert "is not the teacher that" in capsys.readouterr().err


def test_a_changed_conversion_is_not_verified(pair: tuple[Path, Path], converted: Path, capsys) -> None:
    zero(converted / "release/__0_0.distcp", 400_000, 400_100)
    assert verify_model([str(converted), str(pair[0])]) == 2
    assert "are not what the conversion wrote" in capsys.readouterr().err


def test_what_is_remembered_is_not_copied(source: Path, tmp_path: Path) -> None:
    contents_at_start(source, [weights(source)])
    (source / CACHE_FILE).touch()  # even if the files are too new
    write_student(tmp_path / "run", source)
    assert convert_to_hf(["--load", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--no-verify"]) == 0
    convert(source, tmp_path / "again", "--no-verify")
    assert not [*(tmp_path / "out").rglob(CACHE_FILE), *(tmp_path / "again").rglob(CACHE_FILE)]


# ---- what earlier versions wrote ----


def as_before(run: Path, fingerprint: str) -> None:
    """Have the checkpoint say what an earlier version noted of its teacher."""
    path = run / "iter_0000003"
    state, config, shape = read_state(path)
    (path / "run.json").unlink()
    path.rename(path.with_name("partial"))
    state.teacher_fingerprint = fingerprint
    publish(path.with_name("partial"), path, state, config, shape, {})


@pytest.mark.parametrize("form", [0, 1], ids=["Hugging Face", "converted"])
def test_an_older_checkpoint_is_compared_by_samples_with_a_warning(
    pair: tuple[Path, Path], tmp_path: Path, tiny_text: str, form: int, capsys
) -> None:
    write_student(tmp_path / "run", pair[0])
    as_before(tmp_path / "run", open_teacher(describe_teacher(pair[0])).sampled_fingerprint())
    checked = check(to_go_on(tmp_path / "run", pair[form], tiny_text), 1)
    (warning,) = checked.warnings
    assert "was written by an earlier version, which noted samples of the teacher's files only" in warning
    assert checked.state.teacher_fingerprint == fingerprint(pair[0]) and checked.state.teacher_fingerprint[:5] == PREFIX
    flags = ["--load", str(tmp_path / "run"), "--teacher", str(pair[form]), "--output", str(tmp_path / "out")]
    capsys.readouterr()
    assert convert_to_hf([*flags, "--no-verify"]) == 0
    assert capsys.readouterr().err.count("noted samples of the teacher's files only") == 1
    as_before(tmp_path / "run", "0" * 64)
    with pytest.raises(ConfigError, match="is not the teacher that"):
        check(to_go_on(tmp_path / "run", pair[form], tiny_text), 1)


def convert_as_before(source: Path, converted: Path) -> None:
    """Have the record say what an earlier version noted."""
    record = json.loads((converted / "megatron_lrc.json").read_text())
    old = {name: record[name] for name in ("config_sha256", "files")}
    old["fingerprint"] = open_teacher(describe_teacher(source)).sampled_fingerprint()
    old["samples_sha256"] = sampled_files(converted / "release", record["files"])
    (converted / "megatron_lrc.json").write_text(json.dumps(old))


def test_a_teacher_that_an_earlier_version_converted_still_opens_with_a_warning(
    source: Path, converted: Path, tmp_path: Path, tiny_text: str
) -> None:
    convert_as_before(source, converted)
    write_student(tmp_path / "run", source)
    config = to_go_on(tmp_path / "run", converted, tiny_text)
    with pytest.raises(ConfigError, match="is one that an earlier version has converted, convert it again"):
        check(config, 1)  # the checkpoint knows every byte, the record only samples
    as_before(tmp_path / "run", fingerprint(converted))
    checked = check(config, 1)
    (warning,) = checked.warnings
    assert "was converted by an earlier version" in warning and "Convert the Hugging Face directory again" in warning
    change_config(converted, rms_norm_eps=1e-6)
    with pytest.raises(ConfigError, match="is not the teacher that"):
        check(config, 1)
    flip_a_bit(converted / "release/__0_0.distcp", 100, 101)
    with pytest.raises(ConfigError, match="the files in release/ are not what the conversion wrote"):
        check(config, 1)


# ---- teachers that nobody trained, or that did not arrive whole ----


def test_zeros_and_constants_are_named_at_the_start(source: Path, tmp_path: Path, tiny_text: str, capsys) -> None:
    names = ("model.layers.3.mlp.up_proj.weight", "model.layers.5.self_attn.q_proj.weight")

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[names[0]].zero_()
        tensors[names[1]].fill_(0.5)

    change_weights(source, damage)
    words = f"{names[0]} in model.safetensors is all zero, {names[1]} in model.safetensors is constant."
    capsys.readouterr()
    convert(source, tmp_path / "converted", "--no-verify")
    assert words in capsys.readouterr().err
    for teacher in (source, tmp_path / "converted"):
        (warning,) = check(make_config(str(teacher), tiny_text, tmp_path / "run", steps=1), 1).warnings
        assert words in warning and f"--teacher {teacher}" in warning


# ---- more in the directory than the weights ----


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_weights_is_refused(source: Path, tmp_path: Path, capsys, name: str) -> None:
    (source / name).write_text("{}")
    message = refused_conversion(capsys, source, tmp_path / "out")
    assert f"--hf-model {source} holds {name} beside the weights" in message and "merge_and_unload" in message


def test_two_sets_of_weights_are_refused(source: Path, tmp_path: Path, capsys) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused_conversion(capsys, source, tmp_path / "out")
    assert "a model.safetensors.index.json that names other files (model-00001-of-00002.safetensors)" in message
    index = {"weight_map": {"model.norm.weight": "model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint(source)
