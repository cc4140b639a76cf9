"""tools/preprocess_data.py: what it writes is what the tokenizer says, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_data
from command_line import ROOT
from megatron_lrc.config import ConfigError
from megatron_lrc.data import encoding, indexing
from megatron_lrc.data.tokenizers import load_tokenizer
from preprocess_tool import check_refused, file_names, preprocess
from tiny_data import read_documents


def test_documents_equal_the_tokenizers_ids_and_end_with_eod(tmp_path, tokenizer_folder):
    from transformers import AutoTokenizer

    texts = tiny_data.make_texts(50)
    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", texts)
    flags = ("--input", source, "--tokenizer-model", tokenizer_folder, "--output-prefix")
    assert preprocess(*flags, tmp_path / "out" / "plain") == 0
    assert preprocess(*flags, tmp_path / "out" / "ended", "--append-eod") == 0

    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    expected = [reference(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert max(map(len, expected)) > 4  # the truncation in tokenizer.json would show
    assert read_documents(tmp_path / "out" / "plain_text_document") == expected
    ended = read_documents(tmp_path / "out" / "ended_text_document")
    assert ended == [[*ids, reference.eos_token_id] for ids in expected]


def test_manifest_names_tokenizer_counts_and_sources(tmp_path, tokenizer_folder):
    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", [*tiny_data.make_texts(10), ""])
    assert preprocess("--input", source, "--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "o") == 0
    documents = read_documents(tmp_path / "o_text_document")
    manifest = json.loads((tmp_path / "o_text_document.json").read_text())
    tokenizer = load_tokenizer(tokenizer_folder)
    assert manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert manifest["tokenizer"]["vocab_size"] == tokenizer.vocab_size
    assert manifest["tokenizer"]["eod"] == tokenizer.eod
    assert (manifest["documents"], manifest["tokens"]) == (len(documents), sum(map(len, documents)))
    assert manifest["empty_documents"] == 1
    assert manifest["sources"] == [{"path": source, "bytes": os.path.getsize(source)}]


def test_output_does_not_depend_on_the_number_of_workers(tmp_path, tokenizer_folder, capsys):
    sources = [
        tiny_data.write_jsonl(tmp_path / "a.jsonl", tiny_data.make_texts(6000)),
        tiny_data.write_jsonl(tmp_path / "b.jsonl", tiny_data.make_texts(10, seed=1)),
    ]
    assert os.path.getsize(sources[0]) > 2 * encoding.CHUNK_BYTES
    for workers in (1, 2):
        folder = tmp_path / f"workers{workers}"
        flags = ("--input", *sources, "--tokenizer-model", tokenizer_folder, "--append-eod", "--workers", workers)
        assert preprocess(*flags, "--output-prefix", folder / "o", "--log-interval", 1000) == 0
    assert file_names(tmp_path / "workers1") == {"o_text_document.bin", "o_text_document.idx", "o_text_document.json"}
    for name in file_names(tmp_path / "workers1"):
        assert (tmp_path / "workers1" / name).read_bytes() == (tmp_path / "workers2" / name).read_bytes()
    assert len(read_documents(tmp_path / "workers2" / "o_text_document")) == 6010
    assert "MB/s" in capsys.readouterr().out


def test_each_json_key_gives_a_dataset(tmp_path, tokenizer_folder):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "word1", "title": "word2 word3"}\n')
    flags = ("--input", source, "--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "o")
    assert preprocess(*flags, "--json-keys", "text", "title") == 0
    encode = load_tokenizer(tokenizer_folder).encode_batch
    assert read_documents(tmp_path / "o_text_document") == encode(["word1"])
    assert read_documents(tmp_path / "o_title_document") == encode(["word2 word3"])


def test_sentencepiece_model(tmp_path, capsys):
    import sentencepiece

    texts = tiny_data.make_texts(200)
    with open(tmp_path / "sp.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=50, minloglevel=2
        )
    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", texts[:20])
    flags = ("--input", source, "--tokenizer-type", "SentencePieceTokenizer", "--output-prefix", tmp_path / "o")
    assert preprocess(*flags, "--tokenizer-model", tmp_path / "sp.model", "--append-eod", "--workers", 2) == 0
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    expected = [[*reference.encode(text), reference.eos_id()] for text in texts[:20]]
    assert read_documents(tmp_path / "o_text_document") == expected
    assert preprocess(*flags, "--tokenizer-model", source) == 2
    assert "is not a SentencePiece model" in capsys.readouterr().err


BAD_LINES = {
    "not JSON": (b'{"text": "word1"', "not valid JSON"),
    "not UTF-8": (b'{"text": "word\xff"}', "not UTF-8 (byte 0xff at column 15)"),
    "no key": (b'{"body": "word1"}', "no key 'text' (the line has ['body']"),
    "not an object": (b'["word1"]', "a list, not an object"),
    "not text": (b'{"text": 5}', "the value of 'text' is a number, not text"),
    "lone surrogate": (b'{"text": "\\ud83d"}', "the value of 'text' has half of a surrogate pair"),
}


@pytest.mark.parametrize("line, reason", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_fatal_with_its_number_and_leaves_nothing(tmp_path, tokenizer_folder, capsys, line, reason):
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "word1"}\n\n' + line + b'\n{"text": "word2"}\n')
    flags = ("--input", source, "--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "o")
    assert preprocess(*flags) == 2
    captured = capsys.readouterr().err
    assert f"{source}:3: {reason}" in captured and captured.count("\n") == 1
    assert file_names(tmp_path) == {"a.jsonl"}

    assert preprocess(*flags, "--on-bad-line", "skip") == 0
    assert f"skipped 1 bad lines, the first being {source}:3: {reason}" in capsys.readouterr().out
    assert read_documents(tmp_path / "o_text_document") == load_tokenizer(tokenizer_folder).encode_batch(
        ["word1", "word2"]
    )
    assert json.loads((tmp_path / "o_text_document.json").read_text())["bad_lines"] == 1


def test_first_bad_line_is_the_same_with_workers(tmp_path, tokenizer_folder, capsys):
    source = Path(tiny_data.write_jsonl(tmp_path / "a.jsonl", tiny_data.make_texts(4000)))
    lines = source.read_bytes().split(b"\n")
    lines[3000] = lines[3500] = b"{"
    source.write_bytes(b"\n".join(lines))
    flags = ("--input", source, "--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "o")
    assert preprocess(*flags, "--workers", 2) == 2
    assert f"{source}:3001: not valid JSON" in capsys.readouterr().err
    assert file_names(tmp_path) == {"a.jsonl"}


def test_bad_arguments_are_one_sentence_and_leave_nothing(tmp_path, tokenizer_folder, capsys):
    good = tiny_data.write_jsonl(tmp_path / "a.jsonl", ["word1"])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('\n{"text": ""}\n')
    (tmp_path / "bad.jsonl").write_text("bad\n")
    (tmp_path / "no_tokenizer").mkdir()
    endless = tiny_data.write_tokenizer(tmp_path / "no_eos", eos=False)
    before = file_names(tmp_path)
    out = ("--output-prefix", tmp_path / "o")
    tokenizer = ("--tokenizer-model", tokenizer_folder)
    check_refused(capsys, "there is no such file", "--input", tmp_path / "none.jsonl", *tokenizer, *out)
    for name, why in {
        "empty.jsonl": "under 'text': the files hold no row. Give files that do.",
        "blank.jsonl": "under 'text': each row (of 1) has an empty text there, or a chat of which the chat template",
        "bad.jsonl": "under 'text': every line is bad (skipped 1 bad lines, the first being ",
    }.items():
        flags = ("--input", tmp_path / name, *tokenizer, *out, "--append-eod", "--on-bad-line", "skip")
        check_refused(capsys, f"{name}: no document with text {why}", *flags)
    missing = ("--tokenizer-model", tmp_path / "none")
    check_refused(capsys, "There is no tokenizer directory", "--input", good, *missing, *out)
    empty = ("--tokenizer-model", tmp_path / "no_tokenizer")
    check_refused(capsys, "finds no tokenizer", "--input", good, *empty, *out)
    check_refused(capsys, "has no EOS token", "--input", good, "--tokenizer-model", endless, *out, "--append-eod")
    under_a_file = ("--output-prefix", tmp_path / "a.jsonl" / "o")
    check_refused(capsys, "cannot make the folder", "--input", good, *tokenizer, *under_a_file)
    assert file_names(tmp_path) == before


def test_an_input_is_never_overwritten(tmp_path, tokenizer_folder, capsys):
    source = tiny_data.write_jsonl(tmp_path / "o_text_document.json", ["word1"])
    flags = ("--input", source, "--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "o")
    check_refused(capsys, "is one of the inputs", *flags)
    assert json.loads(Path(source).read_text()) == {"text": "word1"}


def test_failure_keeps_the_older_output(tmp_path, tokenizer_folder):
    source = tmp_path / "a.jsonl"
    flags = ("--input", source, "--tokenizer-model", tokenizer_folder, "--output-prefix", tmp_path / "o")
    tiny_data.write_jsonl(source, ["word1"])
    assert preprocess(*flags) == 0
    before = {name: (tmp_path / name).read_bytes() for name in file_names(tmp_path) - {"a.jsonl"}}
    source.write_text("{")
    assert preprocess(*flags) == 2
    assert {name: (tmp_path / name).read_bytes() for name in file_names(tmp_path) - {"a.jsonl"}} == before


def test_interrupt_removes_temporary_files(tmp_path, tokenizer_folder):
    options = indexing.IndexingOptions(
        input=[tiny_data.write_jsonl(tmp_path / "a.jsonl", ["word1"])],
        output_prefix=str(tmp_path / "o"),
        tokenizer_model=tokenizer_folder,
        log_interval=1,
    )

    def interrupt(line: str) -> None:
        assert any(name.endswith(".partial") for name in file_names(tmp_path))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        indexing.index_documents(options, report=interrupt)
    assert file_names(tmp_path) == {"a.jsonl"}


def test_what_is_started_as_a_worker_does_not_hear_of_ctrl_c_while_it_imports():
    waiting = [sys.executable, "-c", "print(flush=True); input()"]
    with encoding._keeping_ctrl_c():
        started = subprocess.Popen(waiting, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout
    started.stdout.readline()
    started.send_signal(signal.SIGINT)
    started.communicate("\n", timeout=30)
    assert started.returncode == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_fingerprint_is_the_vocabulary_not_the_place(tmp_path, tokenizer_folder):
    copied = load_tokenizer(tiny_data.write_tokenizer(tmp_path / "same"))
    other = load_tokenizer(tiny_data.write_tokenizer(tmp_path / "other", words=["quite", "different"]))
    endless = load_tokenizer(tiny_data.write_tokenizer(tmp_path / "no_eos", eos=False))
    original = load_tokenizer(tokenizer_folder)
    assert copied.fingerprint == original.fingerprint
    assert copied.unique_identifiers == original.unique_identifiers
    assert len({original.fingerprint, other.fingerprint, endless.fingerprint}) == 3
    assert endless.eod is None
    with pytest.raises(ConfigError, match="no such|There is no"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_tool_as_a_program(tmp_path, tokenizer_folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=120)

    source = tiny_data.write_jsonl(tmp_path / "a.jsonl", tiny_data.make_texts(20))
    flags = ("--input", source, "--tokenizer-model", tokenizer_folder, "--output-prefix", str(tmp_path / "o"))
    good = run(*flags, "--workers", "2")
    assert good.returncode == 0 and "Traceback" not in good.stderr, good.stderr
    assert len(read_documents(tmp_path / "o_text_document")) == 20
    os.remove(source)
    bad = run(*flags)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith(f"preprocess_data.py: --input {source}: ") and bad.stderr.count("\n") == 1


def test_starting_imports_neither_torch_nor_transformers():
    program = (
        "import sys; import megatron_lrc.commands.preprocess_data, megatron_lrc.data.data_checks;"
        "print([name for name in ('torch', 'transformers', 'megatron.core', 'sentencepiece') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_token_ids_are_taken_as_they_are_and_checked(tmp_path, tokenizer_folder, capsys):
    """The released code's tokenized JSON lines."""
    ids = [[5, 0, 3], [], [1]]
    source = tmp_path / "ids.jsonl"
    source.write_text("".join(json.dumps({"input_ids": document}) + "\n" for document in ids))
    flags = ("--tokenizer-model", tokenizer_folder, "--json-keys", "input_ids", "--output-prefix", tmp_path / "out")
    assert preprocess("--input", source, "--token-ids", *flags) == 0
    assert read_documents(tmp_path / "out_input_ids_document") == [[5, 0, 3], [1]]
    assert json.loads((tmp_path / "out_input_ids_document.json").read_text())["options"]["token_ids"]
    for value, expected in (
        ([0, 10**6], "ids.jsonl:1: the value of 'input_ids' holds 1000000, but the tokenizer's ids are 0 to "),
        ([0, -1], "holds -1, but"),
        ([0, True], "is not a list of token ids, which --token-ids expects"),
        ("text", "is not a list of token ids, which --token-ids expects"),
    ):
        source.write_text(json.dumps({"input_ids": value}) + "\n")
        assert preprocess("--input", source, "--token-ids", *flags) == 2
        assert expected in capsys.readouterr().err
    source.write_text(json.dumps({"input_ids": [1, 2]}) + "\n")
    assert preprocess("--input", source, *flags) == 2
    assert "for a list of token ids add --token-ids" in capsys.readouterr().err
