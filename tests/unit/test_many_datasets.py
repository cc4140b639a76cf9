"""Any number of datasets in a process that may open few files; what the system refuses is never called damage."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from config_cases import data_config
from megatron_lrc.config import ConfigError
from megatron_lrc.data import merging
from megatron_lrc.data.blends import plan_data
from megatron_lrc.data.datasets import Request, build_datasets
from megatron_lrc.data.indexed_files import read_index, read_indexed_file
from megatron_lrc.data.inspection import inspect_dataset
from megatron_lrc.data.mapped_files import map_array
from megatron_lrc.data.passes import MappedDataset
from megatron_lrc.os_errors import explain, raise_file_limit
from tiny_data import numbered, read_documents, write_sequences

NUM_DATASETS, NUM_FILES = 40, 24


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("many")
    return [numbered(folder / f"{number:02d}", 10, first=400 * number) for number in range(NUM_DATASETS)]


@contextlib.contextmanager
def files_left(count: int) -> Iterator[None]:
    """This process may open so many files more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (most + count + 1, before[1]))
    taken = [os.open(os.devnull, os.O_RDONLY)]
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(taken[0]))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_blend_of_many_datasets_needs_few_descriptors(prefixes):
    config = data_config(data_path=prefixes, split="50,50,0", train_iters=60, eval_iters=2)
    build_datasets(data_config(data_path=prefixes[:2], split="50,50,0", train_iters=2, eval_iters=2))  # imports
    before = len(os.listdir("/proc/self/fd"))
    with files_left(NUM_FILES):
        train, valid = build_datasets(config)
        assert train and valid and len(train) >= NUM_DATASETS
        seen = {int(dataset[0]["tokens"][0]) // 400 for dataset in train._datasets}
        assert seen == set(range(NUM_DATASETS)) and len(valid[0]["tokens"]) == 16
    assert len(os.listdir("/proc/self/fd")) == before


def test_merging_and_inspecting_many_datasets_needs_few_descriptors(prefixes, tmp_path):
    with files_left(NUM_FILES):
        merging.merge_datasets(prefixes, str(tmp_path / "all"), report=lambda line: None)
        options = {"verify": True, "samples": 0, "sample_seed": None, "tokenizer_model": None}
        kept = [inspect_dataset(prefix, **options, report=lambda line: None) for prefix in prefixes]
    assert sum(map(len, kept)) == 10 * NUM_DATASETS
    documents = read_documents(tmp_path / "all")
    assert documents[0] == list(range(40)) and documents[-1][-1] == 400 * NUM_DATASETS - 1


def test_tokens_are_those_of_megatron_cores_reader(tmp_path):
    documents = [[[1, 2, 3], [4]], [[5, 6]], [[7] * 9, [8, 9]]]
    for dtype in (numpy.uint16, numpy.int32):
        prefix = write_sequences(tmp_path / numpy.dtype(dtype).name, documents, dtype)
        ours, theirs = MappedDataset(read_indexed_file(prefix)), IndexedDataset(prefix)
        assert ours.sequence_lengths.tolist() == theirs.sequence_lengths.tolist()
        for index, offset, length in [(0, 0, None), (1, 0, None), (3, 4, 5), (3, 4, None), (4, 1, numpy.int64(1))]:
            found, expected = (one.get(index, offset=offset, length=length) for one in (ours, theirs))
            assert found.dtype == expected.dtype and found.tolist() == expected.tolist()


def test_a_mapped_array_outlives_its_file_and_goes_with_its_last_view(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(b"...." + numpy.arange(5, dtype=numpy.int64).tobytes())
    view = map_array(str(path), numpy.int64, (5,), 4)[2:]
    path.unlink()
    assert view.tolist() == [2, 3, 4] and str(path) in Path("/proc/self/maps").read_text()
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    del view
    assert str(path) not in Path("/proc/self/maps").read_text()
    path.write_bytes(b"")
    assert len(map_array(str(path), numpy.int64, (0,))) == 0
    with pytest.raises(ValueError):
        map_array(str(path), numpy.int64, (1,))


def test_too_many_open_files_are_no_damage(prefixes):
    config = data_config(data_path=prefixes[:2], split="50,50,0", train_iters=2, eval_iters=2)
    build_datasets(config)
    request = Request.of(config, plan_data(config))
    reads = [
        lambda: read_indexed_file(prefixes[0]),
        lambda: read_index(prefixes[0]),
        lambda: request.load("train-0-shuffle"),
        lambda: build_datasets(config),
    ]
    for read in reads:
        with files_left(0), pytest.raises(ConfigError) as refusal:
            read()
        text = str(refusal.value)
        assert "Too many open files. This process may have" in text and "raise the limit (ulimit -n" in text
        assert "Remove" not in text and "not an index" not in text and "damaged" not in text


@contextlib.contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """As a user who may not look into the folder."""
    folder.chmod(0)
    try:
        if os.geteuid() == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(os.getuid())
        folder.chmod(0o755)


def test_files_without_the_right_to_them_are_there(tmp_path):
    (tmp_path / "mine").mkdir()
    prefix = numbered(tmp_path / "mine" / "a", 10)
    config = data_config(data_path=[prefix], split="100,0,0", train_iters=2, eval_iters=0)
    build_datasets(config)
    request = Request.of(config, plan_data(config))
    with without_rights(tmp_path / "mine"):
        for read in (lambda: read_indexed_file(prefix), lambda: request.load("train-0-shuffle")):
            with pytest.raises(ConfigError, match="Permission denied. Give this user the right to it"):
                read()


@pytest.mark.parametrize(
    "number, remedy",
    [
        (errno.EMFILE, "raise the limit"),
        (errno.EACCES, "Give this user the right to it"),
        (errno.ENOENT, "if other machines see it, give a folder that all of them share. This machine is "),
        (errno.ESTALE, "start once more"),
        (errno.ENOSPC, "Make room there"),
        (errno.EDQUOT, "Make room there"),
        (errno.EROFS, "mounted for writing"),
        (errno.EIO, "dmesg"),
    ],
)
def test_each_refusal_has_its_own_remedy(number, remedy):
    text = explain(OSError(number, os.strerror(number), "data/a.idx"))
    assert text.startswith(f"data/a.idx: {os.strerror(number)}. ") and remedy in text


def test_commands_may_open_as_many_files_as_the_system_allows():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
    try:
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(before[1], 1 << 20), before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
