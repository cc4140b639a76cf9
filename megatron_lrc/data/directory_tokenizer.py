"""transformers' tokenizer of a directory, held to the ids of the directory's own files.

transformers.AutoTokenizer chooses a class by model type, label and its own version, and many of these classes build
normalizer and pre-tokenizer anew instead of reading them: of one tokenizer.json they make different ids. Here the file
decides, through the generic class that takes it as it is; without one, a SentencePiece model; and what comes out is
compared with that file on known texts.
"""

import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_lrc.config import ConfigError
from megatron_lrc.data.encoders import BackendEncode
from megatron_lrc.data.tokenizer_probes import PLAIN_TEXTS, find_difference, with_special_tokens
from megatron_lrc.json_files import read_json

TOKENIZER_FILE, MODEL_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def has_tokenizer(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds the files of a tokenizer."""
    return any(os.path.isfile(os.path.join(directory, name)) for name in (TOKENIZER_FILE, MODEL_FILE, "vocab.json"))


def open_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """A transformers tokenizer (PreTrainedTokenizerBase) with the ids of this directory's own files.

    ConfigError where there is no tokenizer, none that can be loaded, or one that does not follow its files.
    """
    path = os.fspath(directory)
    if not os.path.isdir(path):
        raise ConfigError(
            f"There is no tokenizer directory {path!r}. A local directory with tokenizer.json or tokenizer.model is "
            "needed (nothing is downloaded): give --tokenizer-model such a directory."
        )
    if os.path.isfile(os.path.join(path, TOKENIZER_FILE)):
        return _of_tokenizer_json(path)
    tokenizer = auto_tokenizer(path)
    if os.path.isfile(os.path.join(path, MODEL_FILE)) and getattr(tokenizer, "backend_tokenizer", None) is not None:
        _follow_model_file(tokenizer, path)
    return tokenizer


def auto_tokenizer(path: str) -> Any:
    """What transformers.AutoTokenizer makes of a directory, whatever its files say; ConfigError if it loads none."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, path)


def spell_as_sentencepiece(backend: Any, *, adds_prefix: bool = True) -> None:
    """Have a BPE backend take blanks as SentencePiece does: each is a U+2581, and one more opens a text.

    Metaspace, which transformers uses instead, leaves the one more out before a text that begins with a blank.
    """
    from tokenizers import normalizers

    blanks = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), blanks]) if adds_prefix else blanks
    backend.pre_tokenizer = None


def rules_of(backend: Any) -> dict[str, Any]:
    """How a `tokenizers.Tokenizer` makes ids of a text, as JSON values: all but a BPE's vocabulary.

    Without what is null or false: a later version of the library writes fields that an earlier one did not know.
    """
    description = json.loads(backend.to_str())
    model = description["model"]
    if isinstance(model.get("vocab"), dict):
        del model["vocab"]
    model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    added = [{key: value for key, value in token.items() if key != "special"} for token in description["added_tokens"]]
    rules = {name: description[name] for name in ("normalizer", "pre_tokenizer", "decoder", "model")}
    return _without_defaults({**rules, "added_tokens": added})


def _without_defaults(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_defaults(item) for key, item in value.items() if item is not None and item is not False}
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def _of_tokenizer_json(path: str) -> Any:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    file = os.path.join(path, TOKENIZER_FILE)
    try:
        own = tokenizers.Tokenizer.from_file(file)
    except Exception as error:  # the library raises bare Exceptions
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{file} is no tokenizer that tokenizers {tokenizers.__version__} reads ({reason}). Download or copy it "
            "again, or install a version of tokenizers that knows it."
        ) from error
    tokenizer = _load(PreTrainedTokenizerFast, path)
    _name_missing_roles(tokenizer, path)
    tokens = [getattr(tokenizer, role) for role in ROLES]
    spelled = with_special_tokens(sorted({token for token in tokens if token and own.token_to_id(token) is not None}))
    own.no_truncation()
    _check_follows(tokenizer, BackendEncode(own), file, [*PLAIN_TEXTS, *spelled])
    return tokenizer


def _name_missing_roles(tokenizer: Any, path: str) -> None:
    """Where the directory's files say nothing of bos and eos, those of the class that transformers would choose."""
    said = _read_json(path, CONFIG_FILE).keys() | _read_json(path, "special_tokens_map.json").keys()
    missing = [role for role in ("bos_token", "eos_token") if getattr(tokenizer, role) is None and role not in said]
    if not missing:
        return
    try:
        chosen = auto_tokenizer(path)
    except ConfigError:
        return
    vocabulary = tokenizer.get_vocab()
    for role in missing:
        if getattr(chosen, role) in vocabulary:
            setattr(tokenizer, role, getattr(chosen, role))


def _follow_model_file(tokenizer: Any, path: str) -> None:
    """Correct how blanks are spelled where transformers' conversion of a SentencePiece model differs from the model."""
    from sentencepiece import SentencePieceProcessor

    file = os.path.join(path, MODEL_FILE)
    try:
        processor = SentencePieceProcessor(model_file=file)
    except (RuntimeError, OSError):
        return  # another library's format by the same name, such as tiktoken's: there is nothing to compare with
    encode = partial(processor.encode, out_type=int)
    if find_difference(encode, BackendEncode(tokenizer.backend_tokenizer), PLAIN_TEXTS):
        spell_as_sentencepiece(tokenizer.backend_tokenizer)
        _check_follows(tokenizer, encode, file, PLAIN_TEXTS)


def _check_follows(tokenizer: Any, encode: Any, file: str, texts: Iterable[str]) -> None:
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    difference = find_difference(encode, BackendEncode(tokenizer.backend_tokenizer), list(texts))
    if difference:
        import transformers

        raise ConfigError(
            f"transformers {transformers.__version__} does not follow {file}: {difference}. {CONFIG_FILE} beside it "
            "may contradict it (added_tokens_decoder): correct that, or give a directory with tokenizer.json alone."
        )


def _load(tokenizer_class: Any, path: str) -> Any:
    try:
        return tokenizer_class.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"transformers finds no tokenizer that it can load in {path!r} ({reason}). Give --tokenizer-model a "
            "directory that holds one, or a SentencePiece .model file."
        ) from error


def _read_json(path: str, name: str) -> dict[str, Any]:
    try:
        values = read_json(Path(path, name))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
