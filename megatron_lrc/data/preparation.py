"""What is known of a data preparation before anything is read: its flags, its files, its tokenizer, all checked."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_lrc import __version__
from megatron_lrc.config import ConfigError
from megatron_lrc.data.byte_pair import fastest
from megatron_lrc.data.encoding import ChunkEncoder
from megatron_lrc.data.file_kinds import kind_of
from megatron_lrc.data.filters import Filter
from megatron_lrc.data.input_files import find_files
from megatron_lrc.data.loaded_tokenizer import Tokenizer
from megatron_lrc.data.restart import Journal
from megatron_lrc.data.selection import Selection
from megatron_lrc.data.tables import check_table
from megatron_lrc.data.tiktoken_files import TiktokenOptions
from megatron_lrc.data.tokenizers import TokenizerType
from megatron_lrc.data.writing import make_folder_of


@dataclass(frozen=True, kw_only=True)
class IndexingOptions:
    """The flags of tools/preprocess_data.py."""

    input: list[str]
    output_prefix: str
    tokenizer_model: str
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    tiktoken: TiktokenOptions = field(default_factory=TiktokenOptions)
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    append_eod: bool = False
    eos_before_bos_after: bool = False
    token_ids: bool = False
    chat_template_name: str | None = None
    chat_date: str | None = None
    assistant_mask: bool = True
    filters: tuple[Filter, ...] = ()
    sample_fraction: float = 1.0
    sample_seed: int = 0
    max_tokens: int | None = None
    source: str | None = None  # its name in a file of sources
    workers: int = 1
    on_bad_line: Literal["fail", "skip"] = "fail"
    log_interval: int = 10000

    @property
    def selection(self) -> Selection:
        return Selection(filters=self.filters, sample_fraction=self.sample_fraction, sample_seed=self.sample_seed)


def prefixes_of(options: IndexingOptions) -> dict[str, str]:
    """The dataset of each key."""
    return {key: f"{options.output_prefix}_{key}_document" for key in options.json_keys}


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """All that was looked at before anything is read. files: path and bytes of each, as the manifest has them."""

    options: IndexingOptions
    files: list[dict[str, Any]]
    tokenizer: Tokenizer
    encoder: ChunkEncoder

    @property
    def prefixes(self) -> dict[str, str]:
        """The dataset of each key."""
        return prefixes_of(self.options)

    def journal(self) -> Journal:
        path = f"{self.options.output_prefix}.unfinished.json"
        return Journal(path, identity_of(self.options, self.files, self.tokenizer))


def prepare(options: IndexingOptions, files: list[dict[str, Any]], tokenizer: Tokenizer) -> Preparation:
    """ConfigError if the tokenizer lacks what the options ask for."""
    tokenizer = with_chat_flags(tokenizer, options)
    before, after = document_ends(options, tokenizer)
    encoder = ChunkEncoder(
        keys=list(prefixes_of(options)),
        encode_batch=fastest(tokenizer.encode_batch),
        vocab_size=tokenizer.vocab_size,
        before=before,
        after=after,
        chat=tokenizer.chat,
        has_token_ids=options.token_ids,
        marks_chats=options.assistant_mask,
        selection=options.selection,
    )
    return Preparation(options=options, files=files, tokenizer=tokenizer, encoder=encoder)


def identity_of(options: IndexingOptions, sources: list[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Whatever decides the bytes of the output; a source that was touched since counts as another one."""
    chat = tokenizer.chat
    return {
        "megatron_lrc_version": __version__,
        "sources": [{**source, "modified": os.stat(source["path"]).st_mtime_ns} for source in sources],
        "keys": options.json_keys,
        "joining": [options.append_eod, options.eos_before_bos_after],
        "token_ids": options.token_ids,
        "assistant_mask": options.assistant_mask,
        "selection": [options.selection.as_manifest(), options.max_tokens],
        "tokenizer": [tokenizer.fingerprint, chat and [chat.template, chat.date]],
    }


def with_chat_flags(tokenizer: Tokenizer, options: IndexingOptions) -> Tokenizer:
    """With the chat template that is chosen, as of the date that is. ConfigError where there is no template."""
    if tokenizer.chat is not None:
        chosen = tokenizer.chat.with_options(name=options.chat_template_name, date=options.chat_date)
        return replace(tokenizer, chat=chosen)
    if options.chat_template_name is not None or options.chat_date is not None:
        raise ConfigError(
            f"--chat-template-name and --chat-date are for tokenizers with a chat template, and "
            f"{options.tokenizer_model!r} has none. Leave them out."
        )
    return tokenizer


def document_ends(options: IndexingOptions, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids before and after every document: nothing, Megatron's end of document, or the released code's joining."""
    if options.append_eod and options.eos_before_bos_after:
        raise ConfigError("--append-eod and --eos-before-bos-after are two ways to join documents. Keep one.")
    if not options.append_eod and not options.eos_before_bos_after:
        return [], []
    flag = "--append-eod" if options.append_eod else "--eos-before-bos-after"
    needed = {"EOS": tokenizer.eod} if options.append_eod else {"EOS": tokenizer.eod, "BOS": tokenizer.bos}
    lacking = [name for name, token in needed.items() if token is None]
    if lacking:
        raise ConfigError(
            f"{flag}: the tokenizer {options.tokenizer_model!r} has no {' and no '.join(lacking)} token. "
            f"Leave out {flag} or use another tokenizer."
        )
    if options.append_eod:
        return [], [tokenizer.eod]  # type: ignore[list-item]
    return [tokenizer.eod], [tokenizer.bos]  # type: ignore[list-item]


def check_options(options: IndexingOptions) -> None:
    """ConfigError for what no file or tokenizer has to be looked at for."""
    if not 0 < options.sample_fraction <= 1:
        raise ConfigError(
            f"--sample-fraction {options.sample_fraction} is no share of the rows. Give one above 0 and at most 1."
        )
    if options.max_tokens is not None and len(prefixes_of(options)) > 1:
        raise ConfigError(
            f"--max-tokens counts the tokens of one dataset, and --json-keys {' '.join(options.json_keys)} gives "
            "several. Prepare them one by one."
        )


def check_paths(options: IndexingOptions, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Paths and sizes of what --input means, none of which an output would overwrite. Makes the output folder.

    Tables are checked here already: one that were mended later would begin everything anew.
    """
    files = find_files(options.input, report)
    check_no_overwriting(prefixes_of(options).values(), files)
    for path in files:
        if kind_of(path) == ".parquet":
            check_table(path, options.json_keys, options.filters)
        elif kind_of(path) == ".txt" and options.filters:
            raise ConfigError(
                f"{path} is plain text, which has no column for --filter '{options.filters[0].text}'. Prepare it "
                "without filters, or as JSON lines."
            )
    make_folder_of(options.output_prefix)
    return [{"path": path, "bytes": os.path.getsize(path)} for path in files]


def check_no_overwriting(prefixes: Iterable[str], files: Iterable[str]) -> None:
    inputs = set(map(os.path.realpath, files))
    for prefix in prefixes:
        for suffix in (".bin", ".mask", ".idx", ".json"):
            if os.path.realpath(prefix + suffix) in inputs:
                raise ConfigError(f"The output {prefix + suffix} is one of the inputs. Use another --output-prefix.")
