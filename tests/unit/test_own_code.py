"""Python code that comes with a model is never run, and nobody is asked whether it should be."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_teachers import write_llama, write_tokenizer
from megatron_lrc.config import ConfigError
from megatron_lrc.data.directory_tokenizer import open_tokenizer
from megatron_lrc.hf.families import describe_teacher
from tools_path import tool_main

ROOT = Path(__file__).parents[2]
CLASSES = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")


def change_json(path: Path, **values: object) -> None:
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(found | values))


def name_a_module(directory: Path, code: str) -> None:
    """As models with classes of their own do; transformers has none for this model_type, so it would need them."""
    (directory / "own.py").write_text(code)
    auto_map = {name: f"own.{name}" for name in CLASSES}
    change_json(directory / "config.json", auto_map=auto_map, model_type="own")


def name_a_module_beside_a_known_class(directory: Path, code: str) -> None:
    name_a_module(directory, code)
    change_json(directory / "config.json", model_type="llama")


def bring_a_way_to_generate(directory: Path, code: str) -> None:
    """Which transformers 4 loads with the model, whatever `trust_remote_code` says."""
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(code)


def name_a_kernel(directory: Path, code: str) -> None:
    change_json(directory / "config.json", attn_implementation="someone/some-kernel")


def name_other_weights(directory: Path, code: str) -> None:
    change_json(directory / "config.json", transformers_weights="other.safetensors")


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the code would write; whoever asks a question is answered yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "it-ran"


@pytest.mark.parametrize(
    "ask",
    [
        name_a_module,
        name_a_module_beside_a_known_class,
        bring_a_way_to_generate,
        name_a_kernel,
        name_other_weights,
    ],
)
def test_a_model_that_brings_code_is_one_sentence_for_every_command(
    tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str], ask: Callable[[Path, str], None]
) -> None:
    directory, plain = tmp_path / "teacher", tmp_path / "plain"
    for path in (directory, plain):
        write_llama(path)
    ask(directory, f"open({str(marker)!r}, 'w').close()\nraise SystemExit")
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    commands: dict[str, list[str]] = {
        "verify_model": [str(directory), str(plain)],
        "evaluate": [str(directory), "--input", str(tmp_path / "text.jsonl"), "--device", "cpu"],
        "convert_from_hf": ["--hf-model", str(directory), "--output", str(tmp_path / "output")],
    }
    for name, arguments in commands.items():
        assert tool_main(name)(arguments) == 2, name
        out, err = capsys.readouterr()
        assert str(directory) in err and "Traceback" not in err and "[y/N]" not in out + err, name
        assert "which is never run here" in err or "architectures" in err, (name, err)
    with pytest.raises(ConfigError, match="which is never run here"):
        describe_teacher(directory)
    assert not marker.exists() and not (tmp_path / "output").exists()


def test_a_tokenizer_of_python_code_is_one_sentence(tmp_path: Path, marker: Path) -> None:
    """Beside a tokenizer.json, which needs no code, the same label is no matter."""
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass AutoTokenizer: pass")
    auto_map = {"AutoTokenizer": ["own.AutoTokenizer", None]}
    change_json(tmp_path / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Own")
    change_json(tmp_path / "vocab.json", a=0)
    with pytest.raises(ConfigError, match="Python code of its own .* Give a directory with tokenizer.json"):
        open_tokenizer(tmp_path)
    write_tokenizer(tmp_path, vocab_size=301)
    change_json(tmp_path / "tokenizer_config.json", auto_map=auto_map)
    open_tokenizer(tmp_path)
    assert not marker.exists()


def test_transformers_loads_through_one_door() -> None:
    door = ROOT / "megatron_lrc/data/pretrained.py"
    for path in (path for folder in ("megatron_lrc", "tools", "examples") for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert path == door or not any(f".{call}(" in text for call in ("from_pretrained", "get_config_dict")), path
