"""convert_from_hf.py writes what it read, or nothing; a checkpoint that is damaged or of another model is refused."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from convert_tool import convert, refused_conversion
from damage import change_config, change_weights
from hf_teachers import OTHERWISE, ROTATED, WRITERS, write_llama, write_qwen2
from megatron_lrc.checkpoints.layout import all_boxes
from megatron_lrc.clone.sites import EMBED, LAYER_SITES, LM_HEAD
from megatron_lrc.config import ConfigError
from megatron_lrc.hf import conversion
from megatron_lrc.hf.checkpoint_reader import CheckpointReader, Record, open_teacher
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.teacher import TeacherReader
from small_disks import fill_disk
from tools_path import convert_from_hf


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untied Qwen2's Hugging Face directory, and what it was converted to."""
    folder = tmp_path_factory.mktemp("conversion")
    write_qwen2(folder / "source")
    convert(folder / "source", folder / "converted")
    return folder / "source", folder / "converted"


@pytest.fixture
def damaged(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the converted teacher, to damage."""
    return Path(shutil.copytree(pair[1], tmp_path / "teacher"))


def refusal(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        open_teacher(describe_teacher(directory))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is written ----


@pytest.mark.parametrize(
    "write", [*WRITERS, *(pytest.param(write, marks=pytest.mark.slow) for write in (*OTHERWISE, *ROTATED))]
)
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tp", [1, 2])
def test_both_readers_give_the_same_tensors_in_every_dtype(tmp_path: Path, write, is_tied: bool, tp: int) -> None:
    write(tmp_path / "source", is_tied=is_tied, dtype=torch.bfloat16)
    convert(tmp_path / "source", tmp_path / "converted")
    one, other = (open_teacher(describe_teacher(tmp_path / name)) for name in ("source", "converted"))
    assert isinstance(one, TeacherReader) and isinstance(other, CheckpointReader)

    def assert_equal(read) -> None:
        expected, found = read(one), read(other)
        assert expected.dtype == found.dtype == torch.bfloat16
        assert torch.equal(expected, found)

    for rank in range(tp):
        place = {"tp_rank": rank, "tp_size": tp}
        for site in (EMBED, LM_HEAD):
            assert_equal(lambda reader, site=site, place=place: reader.site(site, **place, padded_vocab_size=512))
        for site in LAYER_SITES:
            assert_equal(lambda reader, site=site, place=place: reader.site(site, 1, **place))
        for name in one.description.family.frozen:
            assert_equal(lambda reader, name=name, place=place: reader.frozen(name, 0, **place))
    norms = one.description.shape.norms
    for name, layer in ((norms[0], 1), (norms[-1], 0), ("final", None)):
        assert_equal(lambda reader, name=name, layer=layer: reader.norm(name, layer))


def test_everything_but_the_weights_is_copied(pair: tuple[Path, Path]) -> None:
    source, converted = pair
    for path in source.glob("*.json"):
        assert (converted / path.name).read_bytes() == path.read_bytes()
    assert not list(converted.glob("*.safetensors"))
    assert (converted / "latest_checkpointed_iteration.txt").read_text().split() == ["release"]


def test_both_forms_are_the_same_teacher(pair: tuple[Path, Path]) -> None:
    one, other = (open_teacher(describe_teacher(directory)) for directory in pair)
    assert one.fingerprint() == other.fingerprint()


def test_rounded_weights_are_another_teacher_but_widened_ones_are_not(tmp_path: Path) -> None:
    write_llama(tmp_path / "source", dtype=torch.bfloat16)
    source = TeacherReader(describe_teacher(tmp_path / "source"))
    for dtype in ("float32", "float16"):
        convert(tmp_path / "source", tmp_path / dtype, "--dtype", dtype)
    wide, rounded = (open_teacher(describe_teacher(tmp_path / dtype)) for dtype in ("float32", "float16"))
    assert wide.fingerprint() == source.fingerprint() != rounded.fingerprint()
    expected = source.site(LAYER_SITES[0], 1)
    assert torch.equal(wide.site(LAYER_SITES[0], 1), expected.float())
    assert torch.equal(rounded.site(LAYER_SITES[0], 1), expected.half())


def test_mixed_dtypes_are_stored_without_loss(tmp_path: Path) -> None:
    write_llama(tmp_path / "source", dtype=torch.bfloat16)
    path = tmp_path / "source/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].float() + 1e-4
    save_file(tensors, path, metadata={"format": "pt"})
    convert(tmp_path / "source", tmp_path / "converted")
    reader = open_teacher(describe_teacher(tmp_path / "converted"))
    assert torch.equal(reader.site(LAYER_SITES[1], 1), tensors[name])
    assert reader.site(LAYER_SITES[3], 1).dtype == torch.bfloat16


def test_sharded_safetensors_convert_as_the_single_file_does(tmp_path: Path) -> None:
    for name, size in (("one", "5GB"), ("many", "60KB")):
        write_llama(tmp_path / name, max_shard_size=size)
        convert(tmp_path / name, tmp_path / f"{name} converted")
    one, many = (tmp_path / f"{name} converted/release/__0_0.distcp" for name in ("one", "many"))
    assert one.read_bytes() == many.read_bytes()


def test_boxes_cover_every_tensor_once(pair: tuple[Path, Path]) -> None:
    counts: dict[str, Tensor] = {}
    for box in all_boxes(describe_teacher(pair[0]).shape):
        count = counts.setdefault(box.key, torch.zeros(box.global_shape))
        count[tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))] += 1
    assert all(bool((count == 1).all()) for count in counts.values())


def test_a_rank_reads_only_the_pieces_of_its_slice(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    items, read_data = [], FileSystemReader.read_data

    def listen(self, plan, planner):
        items.extend(plan.items)
        return read_data(self, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", listen)
    reader = CheckpointReader(describe_teacher(pair[1]))
    q, k, v = (reader.site(site, 1, tp_rank=1, tp_size=2) for site in LAYER_SITES[:3])
    (item,) = items  # one of two KV groups of one of two layers, once for all three
    assert item.lengths.numel() == q.numel() + k.numel() + v.numel()


# ---- refusals ----


def test_an_output_that_exists_is_refused(pair: tuple[Path, Path], capsys, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output/file").write_text("mine")
    assert "is not empty. Give another directory." in refused_conversion(capsys, pair[0], tmp_path / "output")
    assert "is a file" in refused_conversion(capsys, pair[0], tmp_path / "output/file")


def test_pickled_weights_are_refused_with_advice(pair: tuple[Path, Path], capsys, tmp_path: Path) -> None:
    source = Path(shutil.copytree(pair[0], tmp_path / "source"))
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    message = refused_conversion(capsys, source, tmp_path / "output")
    assert f"--hf-model {source} holds pickled weights" in message and "safe_serialization=True" in message


def test_a_directory_is_not_written_as_the_directory_that_it_is(pair: tuple[Path, Path], capsys, tmp_path) -> None:
    assert "no GGUF file" in refused_conversion(capsys, pair[0], tmp_path / "output", "--format", "hf")


def test_a_converted_teacher_is_not_converted_again(pair: tuple[Path, Path], capsys, tmp_path) -> None:
    assert "has been converted already: --teacher takes it" in refused_conversion(capsys, pair[1], tmp_path / "output")


@pytest.mark.parametrize(("error", "code"), [(OSError("no more space"), 2), (KeyboardInterrupt(), 130)])
def test_a_failure_on_the_way_leaves_nothing_behind(
    pair: tuple[Path, Path], capsys, tmp_path, monkeypatch, error: BaseException, code: int
) -> None:
    written, fill = [], conversion.fill_box

    def fill_some(box, reader, dtype):
        written.append(box)
        if len(written) == 20:
            raise error
        return fill(box, reader, dtype)

    monkeypatch.setattr(conversion, "fill_box", fill_some)
    assert convert_from_hf(["--hf-model", str(pair[0]), "--output", str(tmp_path / "output")]) == code
    assert list(tmp_path.iterdir()) == [] and len(written) == 20
    assert capsys.readouterr().err.count("\n") == 1


def test_a_full_disk_is_one_sentence(pair: tuple[Path, Path], capsys, small_disk: Path) -> None:
    fill_disk(small_disk, 64 * 1024)
    assert "could not be written; the disk may be full" in refused_conversion(capsys, pair[0], small_disk / "output")


def test_a_tensor_that_reads_back_otherwise_is_found(pair: tuple[Path, Path], capsys, tmp_path, monkeypatch) -> None:
    fill = conversion.fill_box

    def fill_wrongly(box, reader, dtype):
        tensor = fill(box, reader, dtype)
        if box.names == ("up",) and box.layer == 1 and box.part == 1:
            tensor[-1, -1] *= 1 + 2**-23
        return tensor

    monkeypatch.setattr(conversion, "fill_box", fill_wrongly)
    message = refused_conversion(capsys, pair[0], tmp_path / "output")
    assert "model.layers.1.mlp.up_proj.weight reads back otherwise" in message


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json"])
def test_a_missing_file_is_named(damaged: Path, name: str) -> None:
    (damaged / "release" / name).unlink()
    assert f"{damaged / 'release' / name} is missing" in refusal(damaged)


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_a_truncated_file_is_named(damaged: Path, size: int) -> None:
    path = damaged / "release/__0_0.distcp"
    content = path.read_bytes()
    path.write_bytes(content[:size])
    message = refusal(damaged)
    assert str(path) in message and f"bytes, {len(content)} were written" in message


def test_files_of_another_conversion_are_refused(damaged: Path) -> None:
    path = damaged / "release/__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="__0_0.distcp in release/ are not what the conversion wrote"):
        open_teacher(describe_teacher(damaged)).fingerprint()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"fingerprint": 1, "config_sha256": "", "files": {"../x": 1}}'])
def test_a_damaged_record_is_refused(damaged: Path, content: str) -> None:
    (damaged / "megatron_lrc.json").write_text(content)
    assert "megatron_lrc.json, which tools/convert_from_hf.py writes" in refusal(damaged)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("intermediate_size", 96, "decoder.layers.mlp.linear_fc1.weight has shape [2, 160, 48], expected [2, 192, 48]"),
        ("vocab_size", 304, "embedding.word_embeddings.weight has shape [301, 48], expected [304, 48]"),
        ("tie_word_embeddings", True, "unexpected tensor output_layer.weight"),
    ],
)
def test_a_config_that_disagrees_with_the_stored_shapes_is_refused(damaged: Path, field, value, words) -> None:
    change_config(damaged, **{field: value})
    assert words in refusal(damaged)


def test_another_config_of_the_same_shapes_is_another_teacher(damaged: Path) -> None:
    before = open_teacher(describe_teacher(damaged)).fingerprint()
    change_config(damaged, rms_norm_eps=1e-5)
    assert open_teacher(describe_teacher(damaged)).fingerprint() != before


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_the_index_runs_no_code(damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, record = damaged / "release/.metadata", json.loads((damaged / "megatron_lrc.json").read_text())
    path.write_bytes(pickle.dumps(Harmful()))
    values = describe_teacher(damaged).config_values
    Record.of(path.parent, fingerprint=record["fingerprint"], config_values=values).write(damaged)
    assert "is not the index of a checkpoint" in refusal(damaged)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("flags", [(), ("--no-verify",)])
def test_values_that_float16_cannot_hold_are_not_converted(tmp_path: Path, capsys, flags: tuple[str, ...]) -> None:
    write_llama(tmp_path / "source")
    change_weights(tmp_path / "source", lambda tensors: tensors["model.norm.weight"][:1].fill_(70000.0))
    message = refused_conversion(capsys, tmp_path / "source", tmp_path / "output", "--dtype", "float16", *flags)
    assert "final has values of up to 70000, and --dtype float16 holds 65504 at most" in message
    change_weights(tmp_path / "source", lambda tensors: tensors["model.norm.weight"].fill_(2e-8))
    message = refused_conversion(capsys, tmp_path / "source", tmp_path / "output", "--dtype", "float16", *flags)
    assert "final has values of up to 2e-08 only, and --dtype float16 holds 5.96e-08 at least" in message
