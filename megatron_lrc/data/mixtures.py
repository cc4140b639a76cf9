"""A YAML list of sources, each of which becomes a dataset: what --sources names.

    - name: fineweb-edu
      input: fineweb-edu/*.parquet         # files, folders, patterns; beside this file unless they are absolute
      filter: int_score >= 4
      max_tokens: 18B                      # its budget
    - name: openhermes
      input: openhermes/*.parquet
      json_keys: conversations
      max_tokens: 450M

Datasets are kept apart, PREFIX_NAME_KEY_document, since a run mixes them: Megatron-LM's --data-path takes weights. All
sources are looked at before any is read. One that is finished keeps its note of progress until all are, so that the
same command, after a stop, reads only what is left.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_lrc.config import ConfigError, refuse_aliases, suggest
from megatron_lrc.data.file_kinds import kind_of
from megatron_lrc.data.filters import parse_filter
from megatron_lrc.data.indexing import write_datasets
from megatron_lrc.data.input_files import Source
from megatron_lrc.data.preparation import (
    IndexingOptions,
    Preparation,
    check_no_overwriting,
    check_options,
    check_paths,
    prefixes_of,
    prepare,
)
from megatron_lrc.data.token_counts import parse_token_count
from megatron_lrc.data.tokenizers import load_tokenizer

_KEYS = ("name", "input", "json_keys", "filter", "sample_fraction", "max_tokens")


def index_sources(path: str, common: IndexingOptions, *, report: Callable[[str], None]) -> list[str]:
    """Writes the datasets of every source of the YAML file, and reports the --data-path that mixes them.

    common: what holds for all sources; its json_keys for those that name none. ConfigError before anything is read for
    a source that cannot be; a source with fewer tokens than its budget is only reported. Gives their prefixes.
    """
    preparations = prepare_sources(path, common, report)
    journals = [preparation.journal() for preparation in preparations]
    for preparation, journal in zip(preparations, journals, strict=True):
        write_datasets(preparation, journal, report=_named(preparation.options, report))
    tokens = {prefix: _tokens_of(prefix) for preparation in preparations for prefix in preparation.prefixes.values()}
    for preparation in preparations:
        _report_shortfall(preparation, tokens, report)
    report(f"train on them with: {data_path(tokens)}")
    for journal in journals:
        journal.remove()
    return list(tokens)


def data_path(tokens: dict[str, int]) -> str:
    """The flag that mixes datasets in proportion to their tokens: each is passed over as often as the others.

    tokens: of each dataset, by prefix.
    """
    total = sum(tokens.values())
    return " ".join(["--data-path", *(f"{count / total:.6g} {prefix}" for prefix, count in tokens.items())])


def prepare_sources(path: str, common: IndexingOptions, report: Callable[[str], None]) -> list[Preparation]:
    """Every source, checked: its settings, files and columns, and that no dataset takes the place of another file."""
    sources, files = read_sources(path, common), []
    for options in sources:
        with _place_named(path, options.source):
            check_options(options)
            files.append(check_paths(options, _named(options, report)))
    _check_outputs(path, sources, [file["path"] for of_source in files for file in of_source])
    tokenizer = load_tokenizer(common.tokenizer_model, common.tokenizer_type, common.tiktoken)
    preparations = []
    for options, of_source in zip(sources, files, strict=True):
        preparation = prepare(options, of_source, tokenizer)
        with _place_named(path, options.source):
            _check_first_lines(preparation)
        preparations.append(preparation)
    return preparations


def read_sources(path: str, common: IndexingOptions) -> list[IndexingOptions]:
    """What the file says, each source's options beside the common ones. ConfigError for what is no list of sources."""
    entries = _load_yaml(path)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} is no list of sources. Give a YAML list, a name and an input in each entry.")
    sources = []
    for number, entry in enumerate(entries, start=1):
        with _place_named(path, entry.get("name", number) if isinstance(entry, dict) else number):
            sources.append(_read_source(entry, os.path.dirname(path), common))
    return sources


def _load_yaml(path: str) -> Any:
    try:
        text = Path(path).read_text(encoding="utf-8")
        refuse_aliases(text)
        return yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"--sources {path} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--sources {path} is not valid YAML ({' '.join(str(error).split())}).") from error


def _read_source(entry: Any, folder: str, common: IndexingOptions) -> IndexingOptions:
    if not isinstance(entry, dict):
        raise ConfigError(f"{entry!r} is no source. Give each a name and an input.")
    for key in entry:
        if key not in _KEYS:
            raise ConfigError(f"{key!r} is no setting of a source{suggest(str(key), _KEYS)}. Use {', '.join(_KEYS)}.")
    name = entry.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(f"the name is {name!r}. Give letters, digits, '-', '.' or '_': it goes into names of files.")
    inputs = _texts(entry, "input")
    if not inputs:
        raise ConfigError("it has no input. Give files, folders or patterns.")
    return replace(
        common,
        source=name,
        input=[os.path.join(folder, item) for item in inputs],
        output_prefix=f"{common.output_prefix}_{name}",
        json_keys=_texts(entry, "json_keys") or common.json_keys,
        filters=tuple(map(parse_filter, _texts(entry, "filter"))),
        sample_fraction=_fraction(entry.get("sample_fraction", 1.0)),
        max_tokens=parse_token_count(entry["max_tokens"], "max_tokens") if "max_tokens" in entry else None,
    )


def _texts(entry: dict[str, Any], key: str) -> list[str]:
    """One text or a list of them."""
    value = entry.get(key, [])
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise ConfigError(f"{key} is {value!r}. Give a text or a list of texts.")
    return values


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"sample_fraction is {value!r}. Give a number above 0 and at most 1.")
    return float(value)


def _check_outputs(path: str, sources: list[IndexingOptions], files: list[str]) -> None:
    """No two sources write one dataset, and none overwrites what any of them reads."""
    writers: dict[str, str | None] = {}
    for options in sources:
        for prefix in prefixes_of(options).values():
            if prefix in writers:
                raise ConfigError(
                    f"{path}: the sources {writers[prefix]!r} and {options.source!r} would both write {prefix}. Give "
                    "them other names."
                )
            writers[prefix] = options.source
    check_no_overwriting(writers, files)


def _check_first_lines(preparation: Preparation) -> None:
    """ConfigError for a first row that would stop the run. What tables hold was checked by their columns."""
    options = preparation.options
    if options.on_bad_line == "skip":
        return
    for path in (file["path"] for file in preparation.files):
        if kind_of(path) not in (".parquet", ".txt"):
            line = next((line for line in Source(path, preparation.encoder.keys) if line.strip()), b"")
            try:
                preparation.encoder.read(line)
            except ConfigError as error:
                raise ConfigError(f"{path}, its first row: {error}. Mend it, or use --on-bad-line skip.") from error


def _report_shortfall(preparation: Preparation, tokens: dict[str, int], report: Callable[[str], None]) -> None:
    budget = preparation.options.max_tokens
    for prefix in preparation.prefixes.values():
        if budget is not None and tokens[prefix] < budget:
            report(
                f"warning: the source {preparation.options.source!r} has {tokens[prefix]:,} tokens, fewer than its "
                f"budget of {budget:,}. All of it was taken, and its weight is that of what is there."
            )


def _tokens_of(prefix: str) -> int:
    return json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))["tokens"]


def _named(options: IndexingOptions, report: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: report(f"{options.source}: {line}")


@contextlib.contextmanager
def _place_named(path: str, source: object) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}, source {source}: {error}") from error
