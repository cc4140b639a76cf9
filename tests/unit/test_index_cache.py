"""tools/build_index_cache.py makes the very folder that a run looks for, on any machine."""

import os
import shutil
from copy import deepcopy
from pathlib import Path

import numpy
import pytest

from config_cases import change, data_config
from megatron_lrc.config import ConfigError
from megatron_lrc.data import datasets
from megatron_lrc.data.blends import plan_data
from megatron_lrc.data.checksums import write_checksums
from megatron_lrc.data.datasets import Request, build_datasets, resolve_train_iters
from tiny_data import numbered, write_dataset
from tools_path import tool_main

build_index_cache = tool_main("build_index_cache")


def flags(*paths: str, steps: int = 30, batch: int = 8) -> list[str]:
    length, iters = ["--seq-length", "16", "--eval-iters", "2"], ["--train-iters", str(steps)]
    return ["--data-path", *paths, "--split", "80,20,0", "--global-batch-size", str(batch), *length, *iters]


@pytest.fixture
def build_nothing(monkeypatch):
    """From here on a run must find its maps."""
    return lambda: monkeypatch.setattr(
        datasets.Request, "write_maps", lambda self, folder: pytest.fail("maps were built again")
    )


def test_a_run_finds_what_the_tool_has_built(tmp_path, capsys, build_nothing):
    first, second = numbered(tmp_path / "a", 60), numbered(tmp_path / "b", 10)
    assert build_index_cache(flags("1", first, "3", second)) == 0
    (folder,) = (tmp_path / "cache").iterdir()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        "30 steps of 8 samples",
        "training: 240 samples of 16 tokens",
        f"  {first}: 60 samples, 0.50 epochs of 119 samples (48 documents, 1920 tokens)",
        f"  {second}: 180 samples, 9.47 epochs of 19 samples (8 documents, 320 tokens)",
        "validation: 16 samples of 16 tokens",
        f"  {first}: 4 samples, 0.14 epochs of 29 samples (12 documents, 480 tokens)",
    ]
    assert lines[-1].startswith(f"index maps: {folder} (built in ")
    assert build_index_cache(flags("1", first, "3", second)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"index maps: {folder} (were there already)"
    build_nothing()
    train, _ = build_datasets(
        data_config(data_path=["1", first, "3", second], split="80,20,0", train_iters=30, eval_iters=2)
    )
    assert train is not None and len(train) == 240


def test_epochs_are_counted_as_the_run_counts_them(tmp_path, capsys, build_nothing):
    paths = [numbered(tmp_path / "a", 60), numbered(tmp_path / "b", 10)]
    assert build_index_cache([*flags(*paths, steps=0), "--train-epochs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["34 steps of 8 samples", "training: 272 samples of 16 tokens"]  # of 2 * (119 + 19)
    assert "234 samples, 1.97 epochs" in lines[2] and "38 samples, 2.00 epochs" in lines[3]
    build_nothing()
    config = data_config(data_path=paths, split="80,20,0", train_iters=0, train_epochs=2, eval_iters=2)
    train, _ = build_datasets(resolve_train_iters(config))
    assert train is not None and len(train) == 276


def test_maps_go_along_with_data_that_is_moved(tmp_path, build_nothing):
    (tmp_path / "here").mkdir()
    prefix = numbered(tmp_path / "here" / "n", 60)
    assert build_index_cache(flags(prefix)) == 0
    shutil.move(tmp_path / "here", tmp_path / "there")
    build_nothing()
    moved = str(tmp_path / "there" / "n")
    train, _ = build_datasets(data_config(data_path=[moved], split="80,20,0", train_iters=30, eval_iters=2))
    assert train is not None and train[0]["tokens"].numel() == 16


def test_other_data_of_the_same_name_has_other_maps(tmp_path):
    for lengths in ((30, 50), (50, 30)):  # as many documents and tokens
        documents = [list(range(length)) for length in lengths * 30]
        assert build_index_cache(flags(write_dataset(tmp_path / "n", documents))) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 2


class Bomb:
    """Pickled, it creates a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.fixture
def built(tmp_path):
    """A configuration whose maps are there, and one of them."""
    config = data_config(data_path=[numbered(tmp_path / "a", 60)], split="80,20,0", train_iters=30, eval_iters=2)
    build_datasets(config)
    (file,) = (tmp_path / "cache").rglob("train-0-shuffle.npy")
    return config, file


def test_a_map_that_would_run_code_is_refused(tmp_path, built):
    config, file = built
    numpy.save(file, numpy.array([Bomb(tmp_path / "it-ran")], dtype=object), allow_pickle=True)
    write_checksums(str(file.parent), name=file.parent.name)
    with pytest.raises(ConfigError, match=r"shuffle.npy is not an index map .* the next start builds it again"):
        build_datasets(config)
    assert not (tmp_path / "it-ran").exists()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("train-0-shuffle.npy", flip_a_bit, "shuffle.npy is damaged"),
        ("train-0-shuffle.npy", lambda path: path.write_bytes(path.read_bytes()[:-8]), "shuffle.npy is damaged"),
        ("valid-0-samples.npy", Path.unlink, "samples.npy is missing"),
        ("checksums.json", Path.unlink, "checksums.json is missing or damaged"),
        ("checksums.json", lambda path: path.write_text('{"train-0-shuffle.npy": [1, 2]}'), "is missing or damaged"),
        ("checksums.json", lambda path: path.write_text("{"), "checksums.json is missing or damaged"),
    ],
)
def test_damaged_maps_are_refused_and_built_again_once_they_are_removed(built, name, damage, message):
    """A changed bit in a map is another order of the samples, or samples of other data, without an error."""
    config, file = built
    before = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    build_datasets(config)
    damage(file.parent / name)
    with pytest.raises(ConfigError, match=f"{message}.* Remove {file.parent}; the next start builds it again"):
        build_datasets(config)
    shutil.rmtree(file.parent)
    build_datasets(config)
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == before


def test_maps_of_another_request_are_refused_though_their_checksums_fit(built):
    """Copied into its folder as a whole they would be another order of the samples, or an index that ends too soon."""
    config, file = built
    other = deepcopy(config)
    change(other, seed=7)
    build_datasets(other)
    (other_file,) = set(file.parent.parent.rglob("train-0-shuffle.npy")) - {file}
    shutil.copytree(other_file.parent, file.parent, dirs_exist_ok=True)
    with pytest.raises(
        ConfigError, match=f"are those of another folder, {other_file.parent.name}. Remove {file.parent}"
    ):
        build_datasets(config)


def errors(capsys, argv: list[str]) -> list[str]:
    assert build_index_cache(argv) == 2
    return capsys.readouterr().err.splitlines()


def test_mistakes_are_one_sentence(tmp_path, capsys):
    prefix = numbered(tmp_path / "n", 60)
    (line,) = errors(capsys, ["--data-path", prefix, "--seq-length", "16"])
    assert line.startswith("build_index_cache.py: --global-batch-size is missing: its default depends on")
    (line,) = errors(capsys, flags(str(tmp_path / "nowhere")))
    assert f"There is no {tmp_path / 'nowhere'}.idx" in line
    (line,) = errors(capsys, ["--global-batch-size", "8"])
    assert "There is no data to build maps for" in line
    (line,) = errors(capsys, [*flags(prefix), "--train-epochs", "1"])
    assert "are given together" in line
    (line,) = errors(capsys, [*flags(prefix), "--load", str(tmp_path)])
    assert "holds no complete checkpoint" in line
    (line,) = errors(capsys, ["--glob-batch", "8"])
    assert "unknown flag --glob-batch" in line
    (line,) = errors(capsys, [*flags(prefix), "--data-cache-path", f"{prefix}.idx"])
    assert "Give --data-cache-path a folder that can be written" in line
    assert [path.name for path in Path(tmp_path).iterdir() if path.is_dir()] == []


def test_a_folder_of_maps_that_only_rank_0_sees_is_named(built):
    config, file = built
    request = Request.of(config, plan_data(config))
    assert request.fill_cache() is True
    file.unlink()  # as it looks to a rank on a machine with a folder of its own
    with pytest.raises(ConfigError, match="shuffle.npy is not there, where rank 0 .* Give it with --data-cache-path"):
        request.open(config, plan_data(config))
