"""The one door to the loaders of transformers: configurations, tokenizers and models of a local directory.

Nothing is downloaded, no Python code that lies in the directory or that it names is run, and nobody is asked whether it
should be. `trust_remote_code=False` alone does not give that: version 4 runs what a local directory has in a folder
custom_generate all the same, and config.json can name a kernel of the Hub or other weights.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_lrc.config import ConfigError
from megatron_lrc.data.config_counts import check_counts
from megatron_lrc.json_files import read_json

_OURS = {"local_files_only": True, "trust_remote_code": False}
_GENERATION_FOLDER = "custom_generate"
_ADAPTER_FILES = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"  # as PEFT names them


def load_config(directory: Path) -> Any:
    """The PretrainedConfig of config.json. Raises what transformers raises."""
    from transformers import AutoConfig

    check_counts(directory)
    refuse_code(directory)
    return AutoConfig.from_pretrained(str(directory), **_OURS)


def load_tokenizer_files(tokenizer_class: Any, directory: str | os.PathLike[str], **how: Any) -> Any:
    """`tokenizer_class.from_pretrained`: AutoTokenizer or a class of it. Raises what transformers raises, and
    ConfigError where only code of the directory's own could load it."""
    check_counts(os.fspath(directory))  # transformers looks for the tokenizer's class in config.json
    try:
        with _files_as_they_are():
            return tokenizer_class.from_pretrained(os.fspath(directory), **_OURS, **how)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ConfigError(
            f"The tokenizer of {os.fspath(directory)} asks for Python code of its own (auto_map), which is never run "
            "here. Give a directory with tokenizer.json or tokenizer.model."
        ) from error


@contextmanager
def _files_as_they_are() -> Iterator[None]:
    """Without tiktoken's cache, which keeps files by their path, among the temporary ones, and would give what a path
    held when it was first read."""
    name = "TIKTOKEN_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = ""  # tiktoken: no cache
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def load_causal_model(directory: Path, **how: Any) -> Any:
    """AutoModelForCausalLM.from_pretrained, of safetensors. Raises what transformers raises."""
    from transformers import AutoModelForCausalLM

    check_counts(directory)
    refuse_code(directory)
    refuse_adapter(directory)
    kind = {} if "gguf_file" in how else {"use_safetensors": True}
    return AutoModelForCausalLM.from_pretrained(directory, **_OURS, **kind, **how)


def refuse_code(directory: Path, *, given: str = "") -> None:
    """ConfigError where transformers would run, or ask for, Python code that comes with a model.

    given: how errors name the directory, if not by its path.
    """
    asks = _code_of(directory / "config.json")
    if (directory / _GENERATION_FOLDER).exists():
        asks = f"holds {_GENERATION_FOLDER}/, Python code of its own"
    if asks:
        raise ConfigError(
            f"{given or directory} {asks}, which is never run here. Give a model that transformers computes with its "
            "own classes; if this is one, remove what asks for the code from a copy."
        )


def refuse_adapter(directory: Path, *, given: str = "") -> None:
    """ConfigError for weights with a PEFT adapter beside them, which transformers would load and this code does not."""
    if found := [name for name in _ADAPTER_FILES if (directory / name).exists()]:
        raise ConfigError(
            f"{given or directory} holds {' and '.join(found)} beside the weights: transformers would load this "
            "adapter too, here it would be left out. Merge it (PEFT's merge_and_unload, then save_pretrained), or move "
            "it away."
        )


def _code_of(path: Path) -> str:
    """What a JSON file asks for that would be code, to complete a sentence; "" for none, or no object."""
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return ""
    if not isinstance(values, Mapping):
        return ""
    if values.get("auto_map"):
        return f"asks for Python code of its own (auto_map in {path.name})"
    kernel = next((values[name] for name in ("attn_implementation", "_attn_implementation") if name in values), None)
    if "/" in str(kernel or ""):
        return f"asks for a kernel of the Hub (attn_implementation in {path.name}: {str(kernel)[:80]})"
    if values.get("transformers_weights"):
        return f"asks for other files of weights (transformers_weights in {path.name})"
    return ""
