"""Small inputs that stand for huge ones: each is a sentence, in little memory and time."""

import bz2
import gzip
import json
import lzma
import resource
import shutil
import signal
import time
import zlib
from pathlib import Path

import pyarrow.parquet
import pytest
import zstandard

from bounded_memory import call_within
from megatron_lrc.config import ConfigError, load_yaml
from megatron_lrc.data import chat_template, encoding, input_files, lines, records, tables
from megatron_lrc.data import limits as limits_of_programs
from megatron_lrc.data.chat_template import ChatTemplate
from megatron_lrc.data.directory_tokenizer import open_tokenizer
from megatron_lrc.data.encoding import ChunkEncoder, read_chunks
from megatron_lrc.data.mixtures import read_sources
from megatron_lrc.data.preparation import IndexingOptions
from megatron_lrc.hf.families import describe_teacher
from tiny_data import write_tokenizer

MIB = 1 << 20


@pytest.fixture
def short_lines(monkeypatch):
    """A line may have 1 MiB."""
    for module in (lines, encoding, input_files, records):
        monkeypatch.setattr(module, "LONGEST_LINE", MIB)


def packed(path: Path, text: bytes) -> Path:
    """One stream, as a packer writes one for what it is piped."""
    if path.suffix == ".zst":
        with open(path, "wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
            file.write(text)
    else:
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lambda text: lzma.compress(text, preset=0)}
        path.write_bytes(pack[path.suffix](text))
    return path


def read_all(path: Path) -> list[tuple[int, str]]:
    """What is wrong with its lines."""
    encoder = ChunkEncoder(keys=["text"], encode_batch=lambda texts: [[1] for _ in texts], vocab_size=2)
    return [bad for chunk in read_chunks([str(path)], ["text"]) for bad in encoder(chunk).bad_lines]


def test_a_table_that_has_one_large_text_in_every_row_is_read_a_few_rows_at_a_time(tmp_path):
    column = pyarrow.DictionaryArray.from_arrays([0] * 40, ["a" * (8 * MIB)])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 2000

    def count() -> int:
        return sum(len(lines) for _, lines in tables.row_lines(str(tmp_path / "a.parquet"), ["text"]))

    assert call_within(512 * MIB, count) == 40


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_a_line_without_end_is_a_bad_line_like_others(tmp_path, short_lines, suffix):
    good = b'{"text": "word1"}\n'
    text = good + b"a" * 48 * MIB + b"\n" + good + b"b" * (MIB + 1)
    path = tmp_path / f"a.jsonl{suffix}"
    if suffix:
        packed(path, text)
        assert path.stat().st_size < MIB
    else:
        path.write_bytes(text)
    bad = call_within(40 * MIB, read_all, path)
    assert [line for line, _ in bad] == [1, 3 if suffix else 1]  # of the chunk
    assert bad[0][1].startswith("longer than 1 MiB")


def test_a_packed_text_that_grows_as_no_text_does_is_refused(tmp_path, short_lines):
    path = packed(tmp_path / "a.txt.xz", b"a" * 48 * MIB)
    with pytest.raises(ConfigError, match="unpacks to a document of more than 1048576, which is no text"):
        call_within(40 * MIB, read_all, path)


@pytest.mark.parametrize("suffix", [".zst", ".xz"])
def test_a_small_file_that_asks_for_gigabytes_to_be_unpacked_with_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    if suffix == ".zst":
        wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=30)
        with open(path, "wb") as raw, zstandard.ZstdCompressor(compression_params=wide).stream_writer(raw) as file:
            file.write(b'{"text": "word1"}\n')
    else:
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
        stored = bytearray(lzma.compress(b'{"text": "word1"}\n', filters=filters))
        size = stored.index(b"\x21\x01") + 2  # of the dictionary, in the block's header: a filter, a byte of properties
        stored[size] = 38  # 2 GiB
        header = stored[12 : 12 + 4 * stored[12]]
        stored[12 + len(header) : 16 + len(header)] = zlib.crc32(bytes(header)).to_bytes(4, "little")
        path.write_bytes(stored)
    with pytest.raises(ConfigError, match=r"a\.jsonl\S+ takes more than 128 MiB of memory to unpack"):
        read_all(path)


LONG = "{% for a in range(90000) %}{% for b in range(90000) %}"
BOMBS = {
    "silent-loops": (LONG + "{% endfor %}{% endfor %}", r"takes more than 0\.1 s"),
    "printing-loops": (LONG + "{{ 'x' * 1000000 }}{% endfor %}{% endfor %}", "takes more than (64 MiB|0.1 s)"),
    "a-product": ("{{ 'x' * 10 ** 10 }}", "takes more than 64 MiB of memory"),
    "a-list": ("{{ ([0] * 10 ** 10) | length }}", "takes more than 64 MiB of memory"),
    "a-power": ("{{ 10 ** (10 ** 8) > 3 }}", r"takes more than (64 MiB|0\.1 s)"),
    "a-width": ("{{ '%1000000000d' % 1 }}", r"takes more than (64 MiB|0\.1 s)"),
    "long-text": ("{{ 'x' * 3000000 }}", "takes 3000000 characters, and 1048576 are allowed"),
    "only-of-this-chat": (
        "{% if messages[0].content == 'word1' %}" + LONG + "{% endfor %}{% endfor %}{% endif %}",
        r"takes more than 0\.1 s",
    ),
}


@pytest.mark.parametrize("template, reason", BOMBS.values(), ids=BOMBS)
def test_a_chat_template_without_end_is_refused_in_little_time_and_memory(tmp_path, monkeypatch, template, reason):
    monkeypatch.setattr(chat_template, "LONGEST_LINE", MIB)
    monkeypatch.setattr(chat_template, "_SECONDS", 0.1)
    monkeypatch.setattr(chat_template, "_MEMORY", 64 * MIB)
    chat = ChatTemplate(write_tokenizer(tmp_path), {"default": template})
    limits = resource.getrlimit(resource.RLIMIT_AS)
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"the tokenizer's chat template {reason}"):
            chat([{"role": "user", "content": "word1"}])
    assert resource.getrlimit(resource.RLIMIT_AS) == limits and signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def seconds_of_work() -> float:
    """What some work takes on this machine: many of the timer's steps, which are of 4 ms or less."""
    began = time.process_time()
    sum(range(3_000_000))
    return time.process_time() - began


def test_time_that_is_over_as_a_call_ends_leaves_nothing_behind():
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    taken, ends = min(seconds_of_work() for _ in range(3)), set()
    for attempt in range(60):
        seconds = taken * (0.4 + attempt / 60)
        try:
            limits_of_programs.call_within(seconds_of_work, seconds=seconds, num_bytes=1 << 30)
            ends.add("result")
        except limits_of_programs.TakesTooMuch:
            ends.add("too much")
        assert signal.getsignal(signal.SIGVTALRM) == handler and resource.getrlimit(resource.RLIMIT_AS) == limits
    assert "too much" in ends


def laughs(key: str) -> str:
    """YAML of 30 lines that means 10^10 items."""
    lists = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 11))
    return f"a0: &a0 x\n{lists}{key}: *a10\n"


def test_yaml_aliases_that_multiply_are_refused(tmp_path):
    (file := tmp_path / "config.yaml").write_text(laughs("preset"))
    with pytest.raises(ConfigError, match=r"is not valid YAML: \*a1 in line 3 stands for a list or a mapping"):
        load_yaml(file)
    (file := tmp_path / "sources.yaml").write_text("- " + laughs("filter").replace("\n", "\n  "))
    with pytest.raises(ConfigError, match=r"is not valid YAML \(\*a1 in line 3 stands for a list or a mapping"):
        read_sources(str(file), IndexingOptions(input=[], output_prefix="o", tokenizer_model="t"))


def test_a_value_may_have_an_alias(tmp_path):
    (file := tmp_path / "config.yaml").write_text("seq_length: &size 64\nglobal_batch_size: *size\n")
    assert load_yaml(file).training.global_batch_size == 64


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 10**9}, {"num_labels": 10**9}, {"x_config": {"n_layers": 1e300}}]
)
def test_counts_beyond_reason_in_config_json_are_refused_before_they_are_followed(tiny_llama, tmp_path, changes):
    folder = Path(shutil.copytree(tiny_llama(), tmp_path / "teacher"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    for read in (describe_teacher, open_tokenizer):
        with pytest.raises(ConfigError, match=r"config\.json has n\w+ 1\S*, and 10,000 at most are taken"):
            read(folder)
