"""A hash over every byte: the same whoever reads which chunk, remembered only where that is safe."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import FileStore

from hf_teachers import write_gemma3
from megatron_lrc.config import ConfigError
from megatron_lrc.hf.constant_tensors import find_suspicious
from megatron_lrc.hf.content_hash import CHUNK_BYTES, FileContents, hash_files, root_of
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.hash_cache import CACHE_FILE, FileState, cache_text
from megatron_lrc.hf.shared_hash import Sharers, contents_at_start
from megatron_lrc.hf.teacher import TeacherReader
from megatron_lrc.launch.agreement import RanksMissing

MODULES = ("content_hash", "hash_cache", "shared_hash", "constant_tensors", "sampled_hash")


def write_files(folder: Path, count: int = 3) -> list[Path]:
    """Files of 3, 1, 2, 1, ... chunks, the last of each not full."""
    sizes, paths = (2 * CHUNK_BYTES + 5, 77, CHUNK_BYTES + 1, 88, 99), []
    for number, size in enumerate(sizes[:count]):
        paths.append(folder / f"model-{number}.bin")
        with open(paths[-1], "wb") as file:
            file.write(b"start")
            file.seek(size - 1)
            file.write(bytes([number]))
    return paths


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Written just now, so not remembered."""
    return write_files(tmp_path)


@pytest.fixture(scope="module")
def old_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Not to be changed. Long enough unchanged to be remembered."""
    return settled(write_files(tmp_path_factory.mktemp("old")))


def settled(paths: list[Path]) -> list[Path]:
    """The same files, as if written an hour ago, after the time that ctime needs, which nobody can set."""
    for path in paths:
        os.utime(path, (time.time() - 3600,) * 2)
    time.sleep(max(0.0, 2.1 - (time.time() - max(path.stat().st_ctime for path in paths))))
    return paths


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def share(files: list[Path], store: Path, ranks: int, timeout: float = 60.0) -> list[dict[Path, FileContents]]:
    """What each of so many ranks of a node finds."""

    def find(rank: int) -> dict[Path, FileContents]:
        sharers = Sharers(FileStore(str(store), -1), 0, rank, tuple(range(ranks)), timeout)
        return contents_at_start(files[0].parent, files, sharers)

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(find, range(ranks)))


def test_it_needs_no_torch() -> None:
    code = f"import sys, megatron_lrc.hf.{', megatron_lrc.hf.'.join(MODULES)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_however_the_chunks_are_shared_the_hash_is_the_same(files: list[Path], tmp_path: Path, ranks: int) -> None:
    alone = hash_files(files)
    for found in share(files, tmp_path / "store", ranks):
        assert found == alone and root_of({"a": 1}, found) == root_of({"a": 1}, alone)


def test_every_byte_name_size_and_value_of_the_config_counts(files: list[Path]) -> None:
    roots = [root_of({"a": 1}, hash_files(files)), root_of({"a": 2}, hash_files(files))]
    for path, offset in ((files[0], CHUNK_BYTES), (files[0], 0), (files[1], 76), (files[2], CHUNK_BYTES)):
        flip(path, offset)
        roots.append(root_of({"a": 1}, hash_files(files)))
    os.truncate(files[0], 2 * CHUNK_BYTES)
    roots.append(root_of({"a": 1}, hash_files(files)))
    files[1].rename(files[1].with_name("other"))
    roots.append(root_of({"a": 1}, hash_files([files[0], files[1].with_name("other"), files[2]])))
    assert len(set(roots)) == len(roots)


# ---- what is remembered ----


def cache_of(files: list[Path]) -> Path:
    return files[0].parent / CACHE_FILE


def forge(files: list[Path]) -> str:
    """Have the cache say that the first chunk of all is another one; what it says now."""
    values, forged = json.loads(cache_of(files).read_text()), "ab" * 32
    values["files"][0][1][0][0] = forged
    cache_of(files).write_text(cache_text(values["files"]))
    return forged


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_start_takes_what_is_remembered_and_a_full_reading_does_not(old_files, tmp_path: Path, ranks: int) -> None:
    cache_of(old_files).unlink(missing_ok=True)
    fresh = share(old_files, tmp_path / "first", 1)[0]
    forged = forge(old_files)
    for found in share(old_files, tmp_path / "second", ranks):
        assert found[old_files[0]].chunks[0].sha256 == forged
    assert hash_files(old_files) == fresh


def test_files_that_have_changed_are_read_again_and_the_others_are_not(tmp_path: Path) -> None:
    files = settled(write_files(tmp_path, 5))
    share(files, tmp_path / "first", 1)
    forged, times = forge(files), (files[1].stat().st_atime, files[1].stat().st_mtime)
    flip(files[1], 10)
    os.utime(files[1], times)  # by a tool that puts the old time back: size, inode and mtime are what they were
    copy = tmp_path / "copy"
    copy.write_bytes(files[2].read_bytes())
    flip(copy, 1000)
    os.replace(copy, files[2])
    os.truncate(files[3], files[3].stat().st_size + 1)
    os.utime(files[4])
    found = share(files, tmp_path / "second", 1)[0]
    assert {path: found[path] for path in files[1:]} == hash_files(files[1:])
    assert found[files[0]].chunks[0].sha256 == forged
    # The others changed just now and may change again in the same moment: they are not remembered.
    assert [key[0] for key, _ in json.loads(cache_of(files).read_text())["files"]] == [os.path.realpath(files[0])]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": 1, "files": []}',
        '{"format": 2, "files": [[["a", 5], []]]}',
        '{"format": 2, "files": 3}',
        "[" * 100_000,
        '{"format": 2, "sha256": "", "files": [[["a", 1e999], []]]}',
        cache_text([[["a", float("inf"), 0, 0, 0], []]]),
        cache_text([[["a", 10**30, 0, 0, 0], []]]),
        cache_text([[["a", 1, 0, 0, 0], [["ab" * 32, {"x": ["00", float("inf")]}]]]]),
    ],
)
def test_a_cache_that_is_damaged_or_foreign_is_as_good_as_none(old_files, tmp_path: Path, content: str) -> None:
    cache_of(old_files).write_text(content)
    assert share(old_files, tmp_path / "first", 1)[0] == hash_files(old_files)
    assert len(json.loads(cache_of(old_files).read_text())["files"]) == 3


def change_case(text: str, sha256: str) -> str:
    return text.replace(sha256, sha256.upper())


def change_a_digit(text: str, sha256: str) -> str:
    return text.replace(sha256, ("0" if sha256[0] != "0" else "1") + sha256[1:])


def change_a_size(text: str, sha256: str) -> str:
    return text.replace("77", "78")


@pytest.mark.parametrize("change", [change_case, change_a_digit, change_a_size])
def test_a_cache_of_which_one_character_has_changed_is_as_good_as_none(old_files, tmp_path: Path, change) -> None:
    cache_of(old_files).unlink(missing_ok=True)
    share(old_files, tmp_path / "first", 1)
    text = cache_of(old_files).read_text()
    changed = change(text, json.loads(text)["files"][0][1][0][0])
    cache_of(old_files).write_text(changed)
    assert changed != text and share(old_files, tmp_path / "second", 1)[0] == hash_files(old_files)
    assert cache_of(old_files).read_text() == text


def test_entries_whose_chunks_are_cut_off_are_not_taken(old_files: list[Path], tmp_path: Path) -> None:
    share(old_files, tmp_path / "first", 1)
    values = json.loads(cache_of(old_files).read_text())
    values["files"][0][1].pop()
    cache_of(old_files).write_text(cache_text(values["files"]))
    assert share(old_files, tmp_path / "second", 1)[0] == hash_files(old_files)


def test_where_no_cache_can_be_written_there_is_none(old_files: list[Path], tmp_path: Path, capfd) -> None:
    cache_of(old_files).unlink(missing_ok=True)
    cache_of(old_files).mkdir()  # as root, as which containers run, one may write anywhere else
    assert share(old_files, tmp_path / "store", 1)[0] == hash_files(old_files)
    assert not list(old_files[0].parent.glob("*.partial")) and capfd.readouterr() == ("", "")
    cache_of(old_files).rmdir()


def test_several_processes_may_write_it_at_once(old_files: list[Path], tmp_path: Path) -> None:
    """Each is a world of its own: several runs of one teacher that start together."""
    cache_of(old_files).unlink(missing_ok=True)

    def start(number: int) -> dict[Path, FileContents]:
        return share(old_files, tmp_path / str(number), 1)[0]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(start, range(4))) == [hash_files(old_files)] * 4
    assert len(json.loads(cache_of(old_files).read_text())["files"]) == 3
    assert not list(old_files[0].parent.glob("*.partial"))


# ---- ranks that fail ----


def test_a_rank_that_does_not_come_is_named_in_one_sentence(files: list[Path], tmp_path: Path) -> None:
    sharers = Sharers(FileStore(str(tmp_path / "store"), -1), 8, 1, (0, 1), timeout=0.1)
    with pytest.raises(RanksMissing, match="Rank 8 did not come within 0.1 s of rank 9"):
        contents_at_start(tmp_path, files, sharers)


def test_a_rank_that_cannot_go_on_tells_those_that_wait_for_its_part(files: list[Path], tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    ranks = [Sharers(FileStore(store, -1), 0, rank, (0, 1), 60.0) for rank in range(2)]

    def second() -> None:
        ranks[1].of_same_files(FileState.of(path) for path in files)
        ranks[1].tell_failure("model-0.bin cannot be read (Input/output error).")

    with ThreadPoolExecutor(2) as threads:
        first, _ = threads.submit(contents_at_start, tmp_path, files, ranks[0]), threads.submit(second)
    assert isinstance(error := first.exception(), ConfigError)
    assert (
        str(error) == f"rank 1 ({socket.gethostname()}) cannot start: model-0.bin cannot be read (Input/output error)."
    )


def test_ranks_of_a_node_that_see_other_files_under_the_same_names_do_not_share(files, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    others = [Path(shutil.copy(path, tmp_path / "other")) for path in files]
    flip(others[1], 9)
    seen = [files, others, files]

    def find(rank: int) -> dict[Path, FileContents]:
        sharers = Sharers(FileStore(str(tmp_path / "store"), -1), 0, rank, (0, 1, 2), 60.0)
        return contents_at_start(seen[rank][0].parent, seen[rank], sharers)

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(find, range(3))) == [hash_files(files), hash_files(others), hash_files(files)]


def test_ranks_of_different_nodes_do_not_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "store"), -1)
    found = []
    for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):
        for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        sharers = Sharers.of_environment(store, 1.0)
        found.append((sharers.node, sharers.rank, sharers.members))
    assert found == [(0, 0, (0, 1)), (0, 1, (0, 1)), (2, 0, (0, 1)), (2, 1, (0, 1))]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert Sharers.of_environment(store, 1.0).members == (0,)


# ---- tensors that no trained model has ----


def suspicious(path: Path) -> list[str]:
    return list(find_suspicious(path, hash_files([path])[path].pieces))


def test_constant_tensors_are_named_and_ordinary_ones_and_zeros_that_mean_something_are_not(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tensors = {
        "good.weight": torch.randn(20, 3),
        "zero.weight": torch.zeros(4, 4),
        "mixed_zero.weight": torch.randn(4, 600, dtype=torch.bfloat16) * 0,
        "late.weight": torch.cat([torch.zeros(4000), torch.full((1,), 1e-45)]),
        "minus_zero_norm.weight": -torch.zeros(6, dtype=torch.float64),
        "seven.weight": torch.full((2, 5), 7.0, dtype=torch.bfloat16),
        "norm.weight": torch.ones(6),
        "no_norm.weight": torch.zeros(6),
        "good.bias": torch.zeros(9),
        "single.weight": torch.ones(1, 1),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert sorted(suspicious(tmp_path / "model.safetensors")) == [
        "minus_zero_norm.weight in model.safetensors is all zero",
        "mixed_zero.weight in model.safetensors is all zero",
        "no_norm.weight in model.safetensors is all zero",
        "seven.weight in model.safetensors is constant",
        "zero.weight in model.safetensors is all zero",
    ]


def test_a_hole_of_a_whole_chunk_and_a_constant_over_several_chunks_are_found(tmp_path: Path) -> None:
    rows = CHUNK_BYTES // 2**10
    tensors = {"a": torch.ones(3 * rows, 256), "b": torch.ones(4 * rows, 256), "c": torch.ones(rows, 256)}
    tensors["b"][1:] += torch.arange(256)
    tensors["b"][rows : 3 * rows] = 0
    tensors["c"] += torch.arange(256)
    save_file(tensors, tmp_path / "model.safetensors")
    assert suspicious(tmp_path / "model.safetensors") == [
        "a in model.safetensors is constant",
        "b in model.safetensors is partly zero",
    ]


def test_gains_that_are_stored_as_what_is_beyond_one_may_be_zero(tmp_path: Path) -> None:
    """As in every student that has not been trained; a matrix may not."""
    model = write_gemma3(tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "layers.1.mlp.up_proj" in name:
                parameter.zero_()
    model.save_pretrained(tmp_path)
    reader = TeacherReader(describe_teacher(tmp_path))
    found = reader.suspicious(hash_files(reader.files))
    assert found == ["model.layers.1.mlp.up_proj.weight in model.safetensors is all zero"]
