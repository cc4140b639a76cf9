"""tools/inspect_data.py: says what is in a dataset, and notices every damage that can be noticed."""

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

import tiny_data
from config_cases import data_config
from megatron_lrc.config import ConfigError
from megatron_lrc.data import indexed_files
from megatron_lrc.data.data_checks import check_data
from megatron_lrc.data.inspection import text_histogram
from tiny_data import write_sequences
from tools_path import tool_main

HEADER_BYTES = 34
inspect_data = tool_main("inspect_data")
preprocess_data = tool_main("preprocess_data")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """Prefix of 80 documents with a manifest; its tokenizer stands beside it."""
    folder = tmp_path_factory.mktemp("corpus")
    source = tiny_data.write_jsonl(folder / "a.jsonl", tiny_data.make_texts(80))
    tokenizer = tiny_data.write_tokenizer(folder / "tokenizer")
    file = folder / "tokenizer" / "tokenizer.json"
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "decoder": decoder}))
    flags = ["--input", source, "--tokenizer-model", tokenizer, "--output-prefix", str(folder / "o"), "--append-eod"]
    assert preprocess_data(flags) == 0
    return str(folder / "o_text_document")


@pytest.fixture
def copied(corpus, tmp_path) -> str:
    """A copy of the corpus to damage."""
    for suffix in (".idx", ".bin", ".json"):
        (tmp_path / f"c{suffix}").write_bytes(Path(corpus + suffix).read_bytes())
    return str(tmp_path / "c")


def test_a_report_has_counts_sizes_tokenizer_and_lengths(corpus, capsys):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    assert inspect_data([corpus, "--verify"]) == 0
    out = capsys.readouterr().out
    dataset = IndexedDataset(corpus)  # kept: without it megatron-core unmaps what its arrays show
    lengths = dataset.sequence_lengths
    manifest = json.loads(Path(f"{corpus}.json").read_text())
    assert re.search(r"documents +80\n", out) and re.search(r"sequences +80\n", out)
    assert f"{lengths.sum():,} (uint16)" in out
    assert f"{Path(corpus + '.bin').stat().st_size:,} bytes" in out
    assert f"{Path(corpus + '.idx').stat().st_size:,} bytes" in out
    assert manifest["tokenizer"]["fingerprint"] in out
    assert f"min {lengths.min()}," in out and f"max {lengths.max()}," in out and f"mean {lengths.mean():.1f}" in out
    assert "verified" in out and f"below the tokenizer's {manifest['tokenizer']['vocab_size']}" in out


def test_documents_of_several_sequences_are_measured_whole(tmp_path, capsys):
    prefix = write_sequences(tmp_path / "s", [[[1, 2], [3]], [[4] * 9], [[5], [6], [7, 8]]])
    assert inspect_data([prefix, "--verify"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"documents +3\n", out) and re.search(r"sequences +6\n", out)
    assert "min 3," in out and "median 4," in out and "max 9," in out
    assert "largest token id 8 (vocabulary not known)" in out and "not known: there is no" in out
    index = indexed_files.read_index(prefix)
    assert [index.document(number).tolist() for number in range(3)] == [[1, 2, 3], [4] * 9, [5, 6, 7, 8]]


def test_the_histogram_counts_each_document_once_by_powers_of_two():
    rows = text_histogram(numpy.array([3, 2, 4, 7, 7, 16], dtype=numpy.int32))
    cells = [re.split(r"  +", row.strip()) for row in rows[1:]]
    assert cells == [
        ["2 - 3", "2", "#" * 34],
        ["4 - 7", "3", "#" * 50],
        ["8 - 15", "0"],
        ["16 - 31", "1", "#" * 17],
    ]


def test_samples_are_the_texts_that_went_in(corpus, capsys):
    assert inspect_data([corpus, "--samples", "3"]) == 0
    samples = re.findall(r'document (\d+) \(\d+ tokens\): (".*")', capsys.readouterr().out)
    texts = tiny_data.make_texts(80)
    assert [(int(number), json.loads(text)) for number, text in samples] == [(i, texts[i] + "</s>") for i in range(3)]

    assert inspect_data([corpus, "--samples", "5", "--sample-seed", "1"]) == 0
    drawn = re.findall(r'document (\d+) \(\d+ tokens\): (".*")', capsys.readouterr().out)
    assert len({number for number, _ in drawn}) == 5 and [number for number, _ in drawn] != ["0", "1", "2", "3", "4"]
    assert all(json.loads(text) == texts[int(number)] + "</s>" for number, text in drawn)


def test_samples_refuse_another_tokenizer_and_ask_for_a_missing_one(corpus, tmp_path, capsys):
    other = tiny_data.write_tokenizer(tmp_path / "other", words=["apple", "pear"])
    assert inspect_data([corpus, "--samples", "1", "--tokenizer-model", other]) == 2
    assert "now has fingerprint" in capsys.readouterr().err
    bare = tiny_data.write_dataset(tmp_path / "bare", [[1, 2, 3], [4000]])
    assert inspect_data([bare, "--samples", "1"]) == 2
    assert "--samples needs a tokenizer" in capsys.readouterr().err
    assert inspect_data([bare, "--samples", "2", "--tokenizer-model", other]) == 2
    assert "holds token id 4000" in capsys.readouterr().err


def test_sentencepiece_samples(tmp_path, capsys):
    import sentencepiece

    texts = [text for text in tiny_data.make_texts(200) if text.isascii()]
    with open(tmp_path / "sp.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=40, minloglevel=2
        )
    model = str(tmp_path / "sp.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    prefix = tiny_data.write_dataset(tmp_path / "sp", [processor.encode(text) for text in texts[:2]])
    assert inspect_data([prefix, "--samples", "2", "--tokenizer-model", model, "--verify"]) == 0
    out = capsys.readouterr().out
    assert f'"{texts[0]}"' in out and f'"{texts[1]}"' in out


def test_the_drawing_is_a_png_and_matplotlib_is_optional(corpus, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "lengths.png"
    assert inspect_data([corpus, "--histogram", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert inspect_data([corpus, "--histogram", str(tmp_path / "absent" / "lengths.png")]) == 2
    assert "No such file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert inspect_data([corpus, "--histogram", str(picture)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert inspect_data([corpus]) == 0


def test_one_damaged_dataset_does_not_hide_the_others(corpus, copied, capsys):
    Path(f"{copied}.bin").write_bytes(b"")
    assert inspect_data([copied, f"{copied}-absent", corpus]) == 2
    out, err = capsys.readouterr()
    assert corpus in out and err.count("\n") == 2
    assert f"{copied}.bin has 0 bytes" in err and f"There is no {copied}-absent.idx" in err


def flipped(data: bytes, at: int, generator: random.Random) -> bytes:
    return data[:at] + bytes([data[at] ^ generator.randrange(1, 256)]) + data[at + 1 :]


def corruptions(idx: bytes, num_documents: int) -> dict[str, tuple[str, Callable[[bytes, random.Random], bytes]]]:
    """By name: the file to damage, and how."""
    lengths, pointers = HEADER_BYTES + 4 * num_documents, HEADER_BYTES + 12 * num_documents

    def truncate(data: bytes, generator: random.Random) -> bytes:
        return data[: generator.randrange(len(data))]

    def append(data: bytes, generator: random.Random) -> bytes:
        return data + generator.randbytes(generator.randint(1, 3 * num_documents))

    def flip(first: int, last: int) -> Callable[[bytes, random.Random], bytes]:
        return lambda data, generator: flipped(data, generator.randrange(first, last), generator)

    return {
        "truncated idx": (".idx", truncate),
        "truncated bin": (".bin", truncate),
        "appended to idx": (".idx", append),
        "appended to bin": (".bin", append),
        "header": (".idx", flip(0, HEADER_BYTES)),
        "lengths": (".idx", flip(HEADER_BYTES, lengths)),
        "pointers": (".idx", flip(lengths, pointers)),
        "documents": (".idx", flip(pointers, len(idx))),
    }


def test_every_random_damage_costs_one_line_and_exit_code_2(copied, capsys):
    """160 corruptions of a dataset with one sequence per document: token ids apart, each byte is checked."""
    whole = {suffix: Path(copied + suffix).read_bytes() for suffix in (".idx", ".bin")}
    assert len(whole[".idx"]) == HEADER_BYTES + 12 * 80 + 8 * 81
    generator = random.Random(4)
    for name, (suffix, damage) in corruptions(whole[".idx"], 80).items():
        for repeat in range(20):
            damaged = damage(whole[suffix], generator)
            assert damaged != whole[suffix]
            Path(copied + suffix).write_bytes(damaged)
            exit_code = inspect_data([copied, "--verify"])
            err = capsys.readouterr().err
            assert exit_code == 2, (name, repeat)
            assert err.count("\n") == 1 and copied in err, (name, repeat, err)
            Path(copied + suffix).write_bytes(whole[suffix])
    assert inspect_data([copied, "--verify"]) == 0


def test_every_damage_of_the_index_is_refused_by_training_too(corpus, copied):
    """160 other corruptions, the same kinds. In the .bin training sees sizes only: see the next test."""
    tokenizer = str(Path(corpus).parent / "tokenizer")
    vocabulary = json.loads(Path(f"{corpus}.json").read_text())["tokenizer"]["vocab_size"]
    config = data_config(data_path=[copied], split="1,1", teacher=tokenizer)
    check_data(config, vocabulary)
    whole = {suffix: Path(copied + suffix).read_bytes() for suffix in (".idx", ".bin")}
    generator = random.Random(6)
    for name, (suffix, damage) in corruptions(whole[".idx"], 80).items():
        for repeat in range(20):
            Path(copied + suffix).write_bytes(damage(whole[suffix], generator))
            with pytest.raises(ConfigError, match=re.escape(copied)) as caught:
                check_data(config, vocabulary)
                pytest.fail(f"{name}, {repeat}: not noticed")
            assert "\n" not in str(caught.value)
            Path(copied + suffix).write_bytes(whole[suffix])
    check_data(config, vocabulary)


def test_what_can_and_cannot_be_seen_of_a_changed_token_id(corpus, copied):
    """Another id of the vocabulary: by nobody. One outside: by --verify; at a run's start only without a manifest."""
    tokenizer = str(Path(corpus).parent / "tokenizer")
    vocabulary = json.loads(Path(f"{corpus}.json").read_text())["tokenizer"]["vocab_size"]
    config = data_config(data_path=[copied], split="1,1", teacher=tokenizer)
    tokens = numpy.fromfile(f"{copied}.bin", numpy.uint16)
    tokens[100] = (int(tokens[100]) + 1) % vocabulary
    tokens.tofile(f"{copied}.bin")
    check_data(config, vocabulary)
    assert inspect_data([copied, "--verify"]) == 0
    tokens[100] = vocabulary
    tokens.tofile(f"{copied}.bin")
    check_data(config, vocabulary)
    assert inspect_data([copied, "--verify"]) == 2
    Path(f"{copied}.json").unlink()
    with pytest.raises(ConfigError, match=f"holds token id {vocabulary}"):
        check_data(config, vocabulary)


def test_megatrons_documents_without_text_train_but_are_not_called_whole(tmp_path):
    """Megatron-LM's own tool makes a document of a line without text; megatron-core's GPTDataset reads sequences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path / "e")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for length in (40, 0, 40, 0):
        builder.add_document([5] * length, [length] if length else [])  # type: ignore[arg-type]
    builder.finalize(f"{prefix}.idx")
    config = data_config(data_path=[prefix], split="1,1")
    check_data(config, 10)
    with pytest.raises(ConfigError, match="Document 1 of .*holds none"):
        indexed_files.read_index(prefix)
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(HEADER_BYTES + 2 * 12 + 8)
        file.write((2).to_bytes(8, "little"))  # 0 2 1 2 2
    with pytest.raises(ConfigError, match="Document 1 of .*begins at sequence 2 and ends at 1"):
        check_data(config, 10)


@pytest.mark.parametrize("prefix_of", ["corpus", "sequences"])
def test_every_flipped_bit_of_lengths_and_pointers_is_noticed_without_a_manifest(prefix_of, copied, tmp_path):
    Path(f"{copied}.json").unlink()
    sequences = write_sequences(tmp_path / "s", [[[1, 2], [3]], [[4] * 9], [[5], [6], [7, 8]]])
    prefix = copied if prefix_of == "corpus" else sequences
    path = Path(f"{prefix}.idx")
    whole = path.read_bytes()
    num_sequences = len(indexed_files.read_index(prefix).lengths)
    generator = random.Random(5)
    bits = range(8 * HEADER_BYTES, 8 * (HEADER_BYTES + 12 * num_sequences))
    for bit in generator.sample(bits, 100):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=re.escape(prefix)):
            indexed_files.read_index(prefix)


def test_compensating_damage_is_noticed_where_the_sizes_still_agree(copied):
    """One length less, another more: the sum, which is all that a run's start looks at, stays the same."""
    path = Path(f"{copied}.idx")
    data = bytearray(path.read_bytes())
    lengths = numpy.frombuffer(data, numpy.int32, count=80, offset=HEADER_BYTES)
    lengths[3] += 1
    lengths[9] -= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"c\.idx points to byte \d+ for sequence 4; the lengths before it say \d+"):
        indexed_files.read_index(copied)
    lengths[3] += 1000
    lengths[9] -= 1000
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="gives sequence 9 a length of -"):
        indexed_files.read_index(copied)


def test_a_pointer_outside_the_file_is_named(copied):
    path = Path(f"{copied}.idx")
    data = bytearray(path.read_bytes())
    numpy.frombuffer(data, numpy.int64, count=80, offset=HEADER_BYTES + 4 * 80)[7] = 1 << 40
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"byte 1099511627776 for sequence 7, outside the \d+ bytes of .*c\.bin"):
        indexed_files.read_index(copied)


@pytest.mark.parametrize(
    ("number", "first_sequence", "message"),
    [
        (0, 1, r"cover sequences 1 to 80 where there are 0 to 80"),
        (80, 79, r"cover sequences 0 to 79 where there are 0 to 80"),
        (5, 6, r"Document 5 of .*c\.idx begins at sequence 6 and ends at 6"),
        (5, -(1 << 63), r"Document 4 of .*c\.idx begins at sequence 4 and ends at -"),
    ],
)
def test_documents_must_begin_at_0_ascend_and_end_at_the_last_sequence(copied, number, first_sequence, message):
    path = Path(f"{copied}.idx")
    data = bytearray(path.read_bytes())
    numpy.frombuffer(data, numpy.int64, count=81, offset=HEADER_BYTES + 12 * 80)[number] = first_sequence
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        indexed_files.read_index(copied)


def test_another_dtype_of_the_same_size_is_noticed_by_the_manifest(copied):
    path = Path(f"{copied}.idx")
    data = bytearray(path.read_bytes())
    assert data[17] == 8  # uint16
    data[17] = 3  # int16
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="says int16, but .* says uint16"):
        indexed_files.read_index(copied)


def test_token_ids_outside_the_vocabulary_are_found_in_any_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_files, "_PIECE", 4)
    prefix = write_sequences(tmp_path / "t", [[[1, 2, 3]], [[4, 5, 6, 300, 8]], [[-1, 2]]], numpy.int32)
    index = indexed_files.read_index(prefix)
    with pytest.raises(
        ConfigError, match=r"t\.bin holds token id 300 at position 6, but the tokenizer's ids are 0 to 9"
    ):
        indexed_files.check_token_ids(index, 10)
    with pytest.raises(ConfigError, match=r"token id -1 at position 8, but the tokenizer's ids are not negative"):
        indexed_files.check_token_ids(index, None)
    good = write_sequences(tmp_path / "g", [[[1, 2, 3]], [[4, 5, 6, 7, 9]]], numpy.int32)
    assert indexed_files.check_token_ids(indexed_files.read_index(good), 10) == 9


def test_small_pieces_find_the_same_as_large_ones(copied, monkeypatch):
    monkeypatch.setattr(indexed_files, "_PIECE", 7)
    assert indexed_files.read_index(copied).num_documents == 80
    path = Path(f"{copied}.idx")
    whole = path.read_bytes()
    for at, message in (
        (HEADER_BYTES + 4 * 80 + 8 * 75, "for sequence 75"),
        (HEADER_BYTES + 12 * 80 + 8 * 7, "Document"),
    ):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 128]) + whole[at + 1 :])
        with pytest.raises(ConfigError, match=message):
            indexed_files.read_index(copied)


def test_a_manifest_without_a_usable_tokenizer_is_refused(copied):
    path = Path(f"{copied}.json")
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["vocab_size"] = "many"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"c\.json is not a manifest of"):
        indexed_files.read_index(copied)
