"""The tokenizer of an export: the teacher's own files, loaded by whichever transformers as the file says.

A tokenizer.json is copied as it is. tokenizer_config.json is written so that AutoTokenizer of transformers 4 and 5
takes the file as it is: the labels that teachers carry make different versions rebuild it in different ways, and the
label that transformers 5 writes does not exist in 4. `find_fault` then compares what AutoTokenizer makes of the result
with the file itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from megatron_lrc.config import ConfigError
from megatron_lrc.data.directory_tokenizer import (
    CONFIG_FILE,
    ROLES,
    TOKENIZER_FILE,
    auto_tokenizer,
    has_tokenizer,
    open_tokenizer,
    texts_with_added_tokens,
)
from megatron_lrc.data.encoders import BackendEncode
from megatron_lrc.data.tokenizer_probes import PLAIN_TEXTS, find_difference
from megatron_lrc.data.tokenizers import load_tokenizer
from megatron_lrc.hf.output_folder import copy_files
from megatron_lrc.json_files import read_json

#: The one class that takes tokenizer.json as it is in transformers 4 and 5.
GENERIC_CLASS = "PreTrainedTokenizerFast"


def write_tokenizer(source: Path, target: Path) -> None:
    """Copy a directory's tokenizer, and say in tokenizer_config.json how it is to be loaded."""
    copy_files(source, target)
    if has_tokenizer(source):
        label_tokenizer(open_tokenizer(source), source, target)


def label_tokenizer(tokenizer: Any, source: Path | None, target: Path) -> None:
    """Write what AutoTokenizer of any version needs to load `tokenizer` in `target`.

    source: the directory it came from, whose own class says what no file does (the side of padding); None if there is
    none. A tokenizer without tokenizer.json gets one, unless only Python code makes its ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    if not (target / TOKENIZER_FILE).is_file():
        backend.save(str(target / TOKENIZER_FILE))
    config_file = target / CONFIG_FILE
    config = read_json(config_file) if config_file.is_file() else {}
    config = _for_any_version(config, tokenizer, _chosen(source) or tokenizer)
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def find_fault(directory: Path, source: Path, data_fingerprint: str = "") -> str | None:
    """What is wrong with the tokenizer of an export, in words; None if it is that of `source`, alike by every way.

    data_fingerprint: of the tokenizer that made the training data, "" where it is not known.
    """
    if not has_tokenizer(source):
        return None
    own = load_tokenizer(str(source))
    if data_fingerprint and own.fingerprint != data_fingerprint:
        return (
            f"the tokenizer of {source} (fingerprint {own.fingerprint[:12]}) is not the one that the training data was "
            f"made with (fingerprint {data_fingerprint[:12]}), so the student would be spoken to in other ids. Put the "
            "tokenizer files of the training back there"
        )
    if load_tokenizer(str(directory)).fingerprint != own.fingerprint:
        return f"its tokenizer is not that of {source}"
    return find_other_ids(directory)


def find_other_ids(directory: Path) -> str | None:
    """How the ids of AutoTokenizer differ from those of tokenizer.json, without and with special tokens, and back."""
    file = directory / TOKENIZER_FILE
    if not file.is_file():
        return None
    loaded, own = auto_tokenizer(str(directory)), tokenizers.Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    texts = [*PLAIN_TEXTS, *texts_with_added_tokens(own)]
    how = f"transformers {transformers.__version__} loads its tokenizer as {type(loaded).__name__}, which "
    encode = BackendEncode(own)
    if found := find_difference(encode, lambda texts: loaded(texts, add_special_tokens=False)["input_ids"], texts):
        return f"{how}does not follow tokenizer.json: {found}{_remedy(directory)}"
    generic = open_tokenizer(directory)
    if loaded(PLAIN_TEXTS[0])["input_ids"] != generic(PLAIN_TEXTS[0])["input_ids"]:
        return f"{how}adds other special tokens than tokenizer.json says"
    back = [[one.decode(ids, skip_special_tokens=False) for ids in encode(list(PLAIN_TEXTS))] for one in (own, loaded)]
    return None if back[0] == back[1] else f"{how}gives back other text than tokenizer.json says"


def _remedy(directory: Path) -> str:
    """For a Qwen2 model type, for which transformers 5 takes its own class whatever the files say."""
    model_type = read_json(directory / "config.json").get("model_type")
    return ". --arch llama computes the same, and is loaded with its own tokenizer" if model_type == "qwen2" else ""


def _for_any_version(config: Mapping[str, Any], tokenizer: Any, chosen: Any) -> dict[str, Any]:
    """tokenizer_config.json with everything explicit that another class would take from its own defaults."""
    roles = {role: token for role in ROLES if (token := getattr(tokenizer, role)) is not None}
    written = {
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": chosen.padding_side,
        **roles,
        **config,
        "tokenizer_class": GENERIC_CLASS,
        "clean_up_tokenization_spaces": False,  # which only some versions obey, and tokenizer.json does not know
    }
    # A list by this name is transformers 5's; 4 wants a mapping there, and knows lists by the other name.
    extra = written.get("extra_special_tokens")
    if isinstance(extra, list):
        del written["extra_special_tokens"]
        written["additional_special_tokens"] = extra
    # Code that is not copied; ways around tokenizer.json; and what 4 would set in it, so it is told the file's own.
    for name in ("auto_map", "from_slow", "use_fast", "add_prefix_space"):
        written.pop(name, None)
    pre_tokenizer = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in pre_tokenizer:
        written["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    return written


def _chosen(source: Path | None) -> Any:
    try:
        return auto_tokenizer(str(source)) if source else None
    except ConfigError:
        return None
