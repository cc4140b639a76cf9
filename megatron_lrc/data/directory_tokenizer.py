"""transformers' tokenizer of a directory, held to the ids of the directory's own files.

transformers.AutoTokenizer chooses a class by model type, label and its own version, and many of these classes build
normalizer and pre-tokenizer anew instead of reading them: of one tokenizer.json they make different ids. Here the file
decides, through the generic class that takes it as it is; without one, a SentencePiece model; and what comes out is
compared with that file on known texts.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_lrc.config import ConfigError
from megatron_lrc.data.config_counts import check_counts
from megatron_lrc.data.encoders import BackendEncode
from megatron_lrc.data.tokenizer_probes import PLAIN_TEXTS, find_difference, with_special_tokens
from megatron_lrc.json_files import read_json

TOKENIZER_FILE, MODEL_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
_VOCABULARY_FILE = "vocab.json"
_OBJECTS = (CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", _VOCABULARY_FILE)  # JSON files of one object
_IN_ALL_PLACES = 8  # added tokens that are tried in every place of a text
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def has_tokenizer(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds the files of a tokenizer."""
    return any(os.path.isfile(os.path.join(directory, name)) for name in (TOKENIZER_FILE, MODEL_FILE, _VOCABULARY_FILE))


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
    check_counts(path)
    objects = {name: _read_object(path, name) for name in _OBJECTS}
    if os.path.isfile(os.path.join(path, TOKENIZER_FILE)):
        return _of_tokenizer_json(path, objects)
    tokenizer = auto_tokenizer(path)
    _check_vocabulary(tokenizer, objects[_VOCABULARY_FILE], os.path.join(path, _VOCABULARY_FILE))
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

    Of the model and the added tokens without what is null or false: a later version of the library writes fields that
    an earlier one did not know. (In a normalizer the two can differ: BERT's strip_accents.)
    """
    description = json.loads(backend.to_str())
    model = description["model"]
    if isinstance(model.get("vocab"), dict):
        del model["vocab"]
    model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    added = [{key: value for key, value in token.items() if key != "special"} for token in description["added_tokens"]]
    rules = {name: description[name] for name in ("normalizer", "pre_tokenizer", "decoder")}
    return {**rules, **_without_defaults({"model": model, "added_tokens": added})}


def _without_defaults(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_defaults(item) for key, item in value.items() if item is not None and item is not False}
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def _of_tokenizer_json(path: str, objects: Mapping[str, dict[str, Any]]) -> Any:
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
    if getattr(own.model, "dropout", None):
        raise ConfigError(
            f"{file} leaves out merges by chance (dropout {own.model.dropout:g}), so that a text gets other ids each "
            "time. Set its dropout to null."
        )
    tokenizer = _load(PreTrainedTokenizerFast, path)
    _name_missing_roles(tokenizer, path, said=objects[CONFIG_FILE].keys() | objects["special_tokens_map.json"].keys())
    _check_no_new_tokens(tokenizer, own, file, objects)
    own.no_truncation()
    own.no_padding()
    _check_follows(tokenizer, BackendEncode(own), file, [*PLAIN_TEXTS, *texts_with_added_tokens(own)])
    return tokenizer


def texts_with_added_tokens(backend: Any) -> list[str]:
    """Texts that spell out every token that a `tokenizers.Tokenizer` looks for before all rules."""
    added = [token.content for _, token in sorted(backend.get_added_tokens_decoder().items())]
    return [*with_special_tokens(added[:_IN_ALL_PLACES]), *(f"word {token} 12{token}word" for token in added)]


def _check_no_new_tokens(tokenizer: Any, own: Any, file: str, objects: Mapping[str, dict[str, Any]]) -> None:
    """Tokens beside those of tokenizer.json have the id that the directory says, not one that transformers makes up."""
    known = own.get_vocab()
    said = {
        str(entry.get("content")): int(key)
        for key, entry in objects[CONFIG_FILE].get("added_tokens_decoder", {}).items()
    } | objects["added_tokens.json"]
    for token, token_id in tokenizer.get_vocab().items():
        if token not in known and said.get(token) != token_id and token != tokenizer.pad_token:
            raise ConfigError(
                f"{CONFIG_FILE} beside {file} names the token {token!r}, which {TOKENIZER_FILE} does not have, so that "
                f"transformers would make up an id for it ({token_id}). Name a token of {TOKENIZER_FILE}, or give its "
                "id in added_tokens_decoder."
            )


def _check_vocabulary(tokenizer: Any, vocabulary: Mapping[str, int], file: str) -> None:
    """A directory with vocab.json, and no tokenizer.json, is loaded with that vocabulary, whatever its label."""
    loaded = tokenizer.get_vocab()
    other = next((token for token, token_id in vocabulary.items() if loaded.get(token) != token_id), None)
    if other is not None:
        raise ConfigError(
            f"transformers loads the tokenizer beside {file} as {type(tokenizer).__name__}, which has the id "
            f"{loaded.get(other)} for {other!r} instead of {vocabulary[other]}. Correct tokenizer_class in "
            f"{CONFIG_FILE}, or give a directory with {TOKENIZER_FILE}."
        )


def _name_missing_roles(tokenizer: Any, path: str, *, said: Collection[str]) -> None:
    """Where the directory's files say nothing of bos and eos, those of the class that transformers would choose."""
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
            "may contradict it (added_tokens_decoder, split_special_tokens, add_prefix_space): correct that, or give a "
            "directory with tokenizer.json alone."
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


def _read_object(path: str, name: str) -> dict[str, Any]:
    """What a JSON file of one object holds; nothing where there is no such file."""
    file_name = os.path.join(path, name)
    try:
        values = read_json(Path(file_name))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file_name} is not valid JSON ({error}). Download or copy it again.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file_name} holds no JSON object. Download or copy it again.")
    return values
