"""The .idx is written a piece at a time, with the bytes of megatron-core's builder."""

import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from megatron_lrc.data import indexed_files
from megatron_lrc.data.writing import DatasetWriter, publish, token_dtype


@pytest.mark.parametrize("piece", [1, 3, 1 << 22])
@pytest.mark.parametrize("vocab_size", [300, 100_000])
def test_files_equal_those_of_megatron_cores_builder(tmp_path, monkeypatch, piece, vocab_size):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    monkeypatch.setattr(indexed_files, "_PIECE", piece)
    generator = numpy.random.default_rng(0)
    lengths = [3, 1, 0, 5, 2, 9, 1]
    documents = [generator.integers(vocab_size, size=length, dtype=numpy.int32) for length in lengths]
    writer = DatasetWriter(str(tmp_path / "ours"), vocab_size)
    writer.add(numpy.concatenate(documents[:4]), lengths[:4])
    writer.add(numpy.concatenate(documents[4:]), lengths[4:])
    writer.complete({})
    writer.close()
    publish(writer.prefix)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        if len(document):
            builder.add_document(document, [len(document)])  # type: ignore[arg-type]
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


@pytest.mark.parametrize("vocab_size", [1, 65_499, 65_500, 65_536, 1 << 20])
def test_the_dtype_is_megatron_cores_choice(vocab_size):
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(vocab_size) is DType.optimal_dtype(vocab_size)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_documents(tmp_path):
    """3 million documents: the builder's Python integers would take some 200 MB."""
    program = f"""
import re, numpy
from megatron_lrc.data import indexed_files
from megatron_lrc.data.writing import DatasetWriter
indexed_files._PIECE = 1 << 16
writer = DatasetWriter({str(tmp_path / "o")!r}, 300)
for _ in range(30):
    writer.add(numpy.ones(100_000, numpy.int32), [1] * 100_000)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
writer.complete({{}})
print(peak() - before)
"""
    root = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30_000  # KiB; one array of all byte offsets would take 24,000
