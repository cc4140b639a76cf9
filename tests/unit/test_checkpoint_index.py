"""Whoever writes a checkpoint's index can neither run code, nor reach out of its folder, nor take memory or time."""

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Size
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_lrc.checkpoints.index import FORMAT_FILE, INDEX_FILE, UnsafeCheckpoint, read_index, refuse_code
from megatron_lrc.checkpoints.index_pickle import unpickle_index
from megatron_lrc.checkpoints.run_directory import STATE_FILE, find_missing
from megatron_lrc.plain_files import file_beside

SAVED = Path(__file__).parents[1] / "fixtures/old_checkpoints/lrc/iter_0000003"


class Bomb:
    """Pickled, it creates a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (self.path,)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAVED, tmp_path / SAVED.name))


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def change(checkpoint: Path, edit: Callable[[Metadata], object]) -> None:
    index = read_index(checkpoint)
    edit(index)
    (checkpoint / INDEX_FILE).write_bytes(pickle.dumps(index))


def place_of_a_tensor(index: Metadata) -> MetadataIndex:
    return next(place for place in index.storage_data if place.fqn.startswith("projections."))


class ByGetattr:
    """Pickled as Python up to 3.11.3 pickles the member of an enumeration."""

    def __init__(self, owner: object, name: object):
        self.arguments = owner, name

    def __reduce__(self) -> tuple[Callable, tuple]:
        return getattr, self.arguments


def test_members_of_enumerations_are_found_as_each_python_pickles_them() -> None:
    for kind in (WriteItemType, _MEM_FORMAT_ENCODING):
        for member in kind:
            assert unpickle_index(pickle.dumps([ByGetattr(kind, member.name), member])) == [member, member]


@pytest.mark.parametrize("arguments", [(Metadata, "__init__"), (WriteItemType, "mro"), ("text", "join"), (Size, 3)])
def test_getattr_gives_nothing_else(arguments: tuple) -> None:
    with pytest.raises(pickle.UnpicklingError, match="getattr of something else"):
        unpickle_index(pickle.dumps(ByGetattr(*arguments)))


def test_checkpoints_of_every_kind_are_accepted() -> None:
    indexes = sorted(SAVED.parents[1].rglob(INDEX_FILE))
    assert len(indexes) >= 3
    for path in indexes:
        assert refuse_code(path.parent).storage_data


def names_of_an_object_elsewhere(checkpoint: Path, bomb: Path) -> list[str]:
    """Names of a file that would run code, beside each of which a harmless file lies where only the last part of the
    name is looked for."""
    elsewhere = checkpoint.parent / "elsewhere"
    for folder in (elsewhere, checkpoint / "sub"):
        folder.mkdir()
        (folder / "objects").write_bytes(saved([Bomb(bomb)]))
    (checkpoint / "objects").write_bytes(saved([None]))
    (checkpoint / "link").symlink_to(elsewhere / "objects")
    os.mkfifo(checkpoint / "pipe")
    names = ["sub/objects", "../elsewhere/objects", str(elsewhere / "objects"), "./sub/../sub/objects", "link", "pipe"]
    return [*names, "..", ".", "", "sub", "objects\0", "sub\\objects", "x" * 300]


def test_an_index_names_plain_files_of_its_own_folder(checkpoint: Path, tmp_path: Path) -> None:
    """torch opens folder / name, whatever the name; an object there is a pickle that megatron-core runs."""
    whole, bomb = read_index(checkpoint), tmp_path / "it-ran"
    for name in names_of_an_object_elsewhere(checkpoint, bomb):
        index = pickle.loads(pickle.dumps(whole))
        index.state_dict_metadata["extra"] = BytesStorageMetadata()
        index.storage_data[MetadataIndex("extra")] = _StorageInfo(name, 0, len(saved([None])))
        (checkpoint / INDEX_FILE).write_bytes(pickle.dumps(index))
        with pytest.raises(UnsafeCheckpoint, match="is not the index of a checkpoint"):
            refuse_code(checkpoint)
    assert not bomb.exists()


def test_a_name_in_the_list_of_files_stays_in_the_folder(checkpoint: Path) -> None:
    record = json.loads((checkpoint / STATE_FILE).read_text())
    for name in ("../outside", "/dev/zero"):
        files = record["files"] | {name: {"size": 1, "crc32": 0}}
        (checkpoint / STATE_FILE).write_text(json.dumps(record | {"files": files, "crc32": None}))
        assert find_missing(checkpoint)


def claim_a_huge_tensor(index: Metadata) -> None:
    """Of 4 TB, which would be allocated before its pieces are read."""
    tensor = index.state_dict_metadata[place_of_a_tensor(index).fqn]
    tensor.size = torch.Size([2**20, 2**20])


def claim_a_huge_piece(index: Metadata) -> None:
    claim_a_huge_tensor(index)
    tensor = index.state_dict_metadata[place_of_a_tensor(index).fqn]
    tensor.chunks = [replace(tensor.chunks[0], offsets=torch.Size([0, 0]), sizes=tensor.size)]


def lose_a_piece(index: Metadata) -> None:
    del index.storage_data[place_of_a_tensor(index)]


def change_a_place(**values: object) -> Callable[[Metadata], None]:
    def edit(index: Metadata) -> None:
        place = place_of_a_tensor(index)
        index.storage_data[place] = replace(index.storage_data[place], **values)

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        claim_a_huge_tensor,
        claim_a_huge_piece,
        lose_a_piece,
        change_a_place(offset=-5),
        change_a_place(offset=10**12),
        change_a_place(length=None),
        change_a_place(relative_path=7),
        change_a_place(transform_descriptors=["zstd"]),
        lambda index: setattr(index, "state_dict_metadata", []),
        lambda index: setattr(index, "storage_data", None),
        lambda index: index.state_dict_metadata.update(extra=3),
        lambda index: index.storage_data.update({MetadataIndex("extra"): 3}),
    ],
)
def test_an_index_is_held_against_the_files(checkpoint: Path, edit: Callable[[Metadata], object]) -> None:
    change(checkpoint, edit)
    with pytest.raises(UnsafeCheckpoint):
        read_index(checkpoint)


PROTOCOL = pickle.PROTO + b"\x04"


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + pickle.STACK_GLOBAL


STORAGE = name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
DOUBLED = pickle.EMPTY_TUPLE + b"".join(
    pickle.MEMOIZE + pickle.BINGET + bytes([number]) + pickle.TUPLE2 for number in range(60)
)

HOSTILE = {
    "a call": name("os", "getpid") + pickle.EMPTY_TUPLE + pickle.REDUCE,
    "the old way to name": b"cos\ngetpid\n" + pickle.EMPTY_TUPLE + pickle.REDUCE,
    "an attribute of an attribute": name("torch", "Size.__class__"),
    "a class given another method": STORAGE
    + pickle.NONE
    + pickle.EMPTY_DICT
    + text("__init__")
    + STORAGE
    + pickle.SETITEM
    + pickle.TUPLE2
    + pickle.BUILD,
    "a memo of 64 GB": pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", 2**32 - 1),
    "a byte array of 1 TB": pickle.BYTEARRAY8 + struct.pack("<Q", 2**40),
    "a text of 1 TB": pickle.BINUNICODE8 + struct.pack("<Q", 2**40),
    "a tuple that takes forever to hash": pickle.EMPTY_DICT + DOUBLED + pickle.NONE + pickle.SETITEM,
    "a call that takes forever to hash": name("torch.distributed.checkpoint.planner", "WriteItemType")
    + DOUBLED
    + pickle.TUPLE1
    + pickle.REDUCE,
    "nothing": b"",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_pickle_is_refused_at_once(checkpoint: Path, what: str) -> None:
    (checkpoint / INDEX_FILE).write_bytes(PROTOCOL + HOSTILE[what] + pickle.STOP)
    init = _StorageInfo.__init__
    with pytest.raises(UnsafeCheckpoint, match="is not the index of a checkpoint"):
        read_index(checkpoint)
    assert _StorageInfo.__init__ is init


@pytest.mark.parametrize("content", ['{"sharded_backend": "zarr"}', "{}", "[]", "[" * 100000, ""])
def test_another_loader_of_megatron_core_is_not_chosen(checkpoint: Path, content: str) -> None:
    (checkpoint / FORMAT_FILE).write_text(content)
    with pytest.raises(UnsafeCheckpoint, match="does not name the format of a checkpoint"):
        refuse_code(checkpoint)


def test_links_of_the_hub_cache_stay_within_one_model(tmp_path: Path) -> None:
    revision, blobs = tmp_path / "models--a--b/snapshots/123", tmp_path / "models--a--b/blobs"
    for folder in (revision, blobs, tmp_path / "others"):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (revision / "in").symlink_to("../../blobs/file")
    (revision / "out").symlink_to(tmp_path / "others/file")
    (revision / "same").symlink_to("file")
    assert file_beside(revision, "in") and file_beside(revision, "same")
    with pytest.raises(ValueError, match="a link to .*others/file, outside of its folder"):
        file_beside(revision, "out")
    with pytest.raises(FileNotFoundError):
        file_beside(revision, "none")
