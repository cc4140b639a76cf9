"""An export's tokenizer gives every version of transformers the ids of the teacher's own file, or is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from megatron_lrc.data.split_patterns import QWEN2
from megatron_lrc.data.tokenizer_probes import PLAIN_TEXTS, with_special_tokens
from megatron_lrc.data.tokenizers import load_tokenizer
from megatron_lrc.hf.exported_tokenizer import find_fault, write_tokenizer
from tokenizer_files import byte_level, copy_with, llama2_style, write_directory, write_model_directory

TEXTS = [*PLAIN_TEXTS, *with_special_tokens(["<s>", "</s>"])]


def export(source: Path, target: Path, model_type: str) -> Path:
    """What an export of a student of this class has of its teacher's tokenizer."""
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"model_type": model_type}))
    write_tokenizer(source, target)
    return target


@pytest.mark.parametrize("student_type", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("label", ["LlamaTokenizer", "GPT2Tokenizer", "TokenizersBackend"])
@pytest.mark.parametrize("make", [llama2_style, byte_level])
def test_autotokenizer_gives_the_ids_of_the_teachers_file(tmp_path: Path, make, label: str, student_type: str) -> None:
    own = make()
    source = write_directory(tmp_path / "teacher", own, label=label, model_type="llama")
    target = export(source, tmp_path / "student", student_type)
    assert find_fault(target, source) is None
    loaded = AutoTokenizer.from_pretrained(target)
    assert loaded(TEXTS, add_special_tokens=False)["input_ids"] == [
        encoding.ids for encoding in own.encode_batch(TEXTS, add_special_tokens=False)
    ]
    assert loaded("a b")["input_ids"] == own.encode("a b").ids  # with BOS where the file adds one
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_teacher_without_tokenizer_json_is_exported_with_one_that_has_the_ids_of_its_model(tmp_path: Path) -> None:
    source = write_model_directory(tmp_path / "teacher")
    target = export(source, tmp_path / "student", "mistral")
    assert find_fault(target, source) is None
    texts = [*PLAIN_TEXTS, " the cat"]
    expected = load_tokenizer(str(source / "tokenizer.model")).encode_batch(texts)
    assert AutoTokenizer.from_pretrained(target)(texts, add_special_tokens=False)["input_ids"] == expected
    assert (target / "tokenizer.model").is_file()


def test_a_qwen2_student_whose_tokenizer_transformers_would_replace_is_refused(tmp_path: Path) -> None:
    source = write_directory(tmp_path / "own", byte_level(), label="PreTrainedTokenizerFast", model_type="qwen2")
    fault = find_fault(export(source, tmp_path / "student", "qwen2"), source)
    assert fault is not None and "loads its tokenizer as Qwen2Tokenizer" in fault and "--arch llama" in fault
    assert find_fault(export(source, tmp_path / "as_llama", "llama"), source) is None
    nfc = {"normalizer": {"type": "NFC"}}
    plain = write_directory(tmp_path / "plain", byte_level(QWEN2), label="Qwen2Tokenizer", model_type="qwen2")
    qwen = copy_with(plain, tmp_path / "qwen", **nfc)
    assert find_fault(export(qwen, tmp_path / "qwen_student", "qwen2"), qwen) is None


def test_a_tokenizer_that_did_not_make_the_data_is_refused(tmp_path: Path) -> None:
    source = write_directory(tmp_path / "teacher", byte_level(), label="LlamaTokenizer", model_type="llama")
    target = export(source, tmp_path / "student", "llama")
    made_with = load_tokenizer(str(source)).fingerprint
    assert find_fault(target, source, made_with) is None
    fault = find_fault(target, source, "0" * 64)
    assert fault is not None and "is not the one that the training data was made with" in fault
    shutil.copy(
        write_directory(tmp_path / "other", llama2_style(), label="LlamaTokenizer", model_type="llama")
        / "tokenizer.json",
        target / "tokenizer.json",
    )
    assert find_fault(target, source, made_with) == f"its tokenizer is not that of {source}"


def test_what_another_class_would_assume_is_written_down(tmp_path: Path) -> None:
    extra = {"extra_special_tokens": ["<s>"], "auto_map": {"AutoTokenizer": ["code.Class", None]}, "from_slow": True}
    extra |= {"use_fast": False, "clean_up_tokenization_spaces": True, "add_prefix_space": True}
    source = write_directory(tmp_path / "t", llama2_style(), label="LlamaTokenizer", model_type="llama", **extra)
    config = json.loads((export(source, tmp_path / "s", "llama") / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]  # 4's generic class adds token_type_ids
    assert config["padding_side"] == AutoTokenizer.from_pretrained(source).padding_side
    assert config["additional_special_tokens"] == ["<s>"] and "extra_special_tokens" not in config
    assert (
        not {"auto_map", "from_slow", "use_fast", "add_prefix_space"} & config.keys() and config["bos_token"] == "<s>"
    )
    assert config["clean_up_tokenization_spaces"] is False


READ_BY_TRANSFORMERS_4 = """
import json, sys, transformers
from transformers import AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
texts = json.load(open(sys.argv[1]))
found = []
for directory in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    found.append(tokenizer(texts, add_special_tokens=False)["input_ids"])
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_transformers_4_gives_the_same_ids(tmp_path: Path) -> None:
    """The exports are loaded by transformers 4 in an environment of its own, as vLLM and others bring it."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "transformers==4.57.6"]
    if (found := subprocess.run(install, capture_output=True, text=True)).returncode:
        pytest.skip(f"transformers 4 cannot be installed here: {found.stderr[-200:]}")
    targets, expected = [], []
    spaced = Tokenizer.from_str(byte_level().to_str())
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    labelled = [(llama2_style, "LlamaTokenizer"), (byte_level, "TokenizersBackend"), (lambda: spaced, "GPT2Tokenizer")]
    for make, label in labelled:
        source = write_directory(tmp_path / f"teacher{len(targets)}", make(), label=label, model_type="llama")
        targets.append(export(source, tmp_path / f"student{len(targets)}", "llama"))
        expected.append(load_tokenizer(str(source)).encode_batch(TEXTS))
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    (tmp_path / "read.py").write_text(READ_BY_TRANSFORMERS_4)
    command = [python, tmp_path / "read.py", tmp_path / "texts.json", *targets]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected
    assert Tokenizer.from_file(str(targets[0] / "tokenizer.json")).encode("a").ids  # and by the installed library
