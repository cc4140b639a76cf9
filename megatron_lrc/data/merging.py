"""Several indexed datasets end to end in one: what tools/merge_datasets.py runs.

The bytes are those of megatron-core's IndexedDatasetBuilder.add_index; `writing.write_index` says why it is
not used.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from megatron_lrc import __version__
from megatron_lrc.config import ConfigError
from megatron_lrc.data.assistant_masks import ENTRY, MaskWriter, describe_counted
from megatron_lrc.data.indexed_files import Index, pieces, read_index
from megatron_lrc.data.loaded_tokenizer import are_alike, describe_unlike
from megatron_lrc.data.selection import ROW_COUNTS
from megatron_lrc.data.writing import IndexPart, lock_of_dataset, make_folder_of, write_index, write_manifest

_SUFFIXES = (".bin", ".mask", ".json", ".idx")  # the .idx takes its final name last: where one stands, all is there
_COPY_BYTES = 1 << 24


def merge_datasets(inputs: list[str], output_prefix: str, *, report: Callable[[str], None]) -> None:
    """Writes the inputs' documents in order as one dataset, with a manifest if every input has one, and with a mask if
    any has one: of an input without a mask all tokens count, as in a run on both."""
    indexes = [read_index(prefix) for prefix in inputs]
    check_alike(indexes)
    check_masks(indexes)
    check_output(inputs, output_prefix)
    manifest = merged_manifest(indexes)
    with lock_of_dataset(output_prefix):
        _write(indexes, output_prefix, manifest, report)
    mask = manifest and manifest.get(ENTRY)
    report(f"wrote {output_prefix}.bin, .idx{', .json' if manifest else ''}{', .mask' if mask else ''}")
    if manifest and mask:
        report(describe_counted(mask["counted_tokens"], manifest["tokens"], "in all"))
    if manifest is None:
        missing = next(index.prefix for index in indexes if index.manifest is None)
        report(f"no manifest was written: {missing}.json does not exist")
    elif manifest["options"] is None:
        report("the inputs were made with different options: see the manifest")


def _write(
    indexes: list[Index], output_prefix: str, manifest: dict[str, Any] | None, report: Callable[[str], None]
) -> None:
    """All files under temporary names, then the final ones."""
    temporary = {suffix: f"{output_prefix}{suffix}.tmp-{os.getpid()}" for suffix in _SUFFIXES}
    try:
        with open(temporary[".bin"], "wb") as output:
            for index in indexes:
                copy_tokens(index, output)
                report(f"copied {index.prefix}: {index.num_documents:,} documents, {index.num_tokens:,} tokens")
        with open(temporary[".idx"], "wb") as output:
            write_index([IndexPart(index.dtype, index.lengths, index.bounds) for index in indexes], output)
        if manifest:
            if any(index.mask for index in indexes):
                manifest[ENTRY] = write_mask(indexes, temporary[".mask"])
            write_manifest(temporary[".json"], manifest)
        rename(output_prefix, temporary)
    finally:
        for path in temporary.values():
            Path(path).unlink(missing_ok=True)


def check_alike(indexes: list[Index]) -> None:
    """All inputs have one dtype, and one tokenizer as far as manifests say."""
    first = indexes[0]
    for index in indexes[1:]:
        if index.dtype != first.dtype:
            raise ConfigError(
                f"{first.prefix} holds {first.dtype.name} token ids and {index.prefix} "
                f"{index.dtype.name}. Merge datasets of one dtype: write them again with the same "
                "tokenizer."
            )
    named = [(index.prefix, index.manifest["tokenizer"]) for index in indexes if index.manifest]
    for prefix, tokenizer in named[1:]:
        first_prefix, first_tokenizer = named[0]
        if not are_alike(tokenizer, first_tokenizer):
            raise ConfigError(
                f"{first_prefix} was made with the tokenizer {describe_unlike(first_tokenizer)} and {prefix} with "
                f"{describe_unlike(tokenizer)}. Merge datasets of one tokenizer."
            )


def check_masks(indexes: list[Index]) -> None:
    """Masks are what was written, and there are manifests that can name the one of all."""
    for index in indexes:
        if index.mask:
            index.mask.check()
            if lacking := next((other.prefix for other in indexes if other.manifest is None), None):
                raise ConfigError(
                    f"{index.prefix}.mask says which tokens count in the losses, and {lacking} has no manifest, so "
                    "that the result would have none to name its mask. Merge datasets of tools/preprocess_data.py."
                )


def check_output(inputs: list[str], output_prefix: str) -> None:
    """The output overwrites no input. Makes its folder."""
    output = os.path.realpath(f"{output_prefix}.idx")
    if output in [os.path.realpath(f"{prefix}.idx") for prefix in inputs]:
        raise ConfigError(f"The output {output_prefix} is one of the inputs. Use another --output-prefix.")
    make_folder_of(output_prefix)


def merged_manifest(indexes: list[Index]) -> dict[str, Any] | None:
    """The manifest of all inputs together, or None if one has none. `options` is None where the inputs' differ."""
    manifests = [index.manifest for index in indexes if index.manifest]
    if len(manifests) < len(indexes):
        return None
    options = [manifest.get("options") for manifest in manifests]
    return {
        "megatron_lrc_version": __version__,
        "tokenizer": manifests[0]["tokenizer"],
        **{count: sum(manifest[count] for manifest in manifests) for count in ("documents", "tokens")},
        "dtype": indexes[0].dtype.name,
        **{count: sum(manifest.get(count, 0) for manifest in manifests) for count in ("empty_documents", "bad_lines")},
        "rows": {
            name: sum(manifest.get("rows", {}).get(name, 0) for manifest in manifests) for name in ROW_COUNTS.values()
        },
        "sources": [source for manifest in manifests for source in manifest.get("sources", [])],
        "options": options[0] if all(option == options[0] for option in options) else None,
        "merged": [
            {
                "prefix": index.prefix,
                "documents": manifest["documents"],
                "tokens": manifest["tokens"],
                "options": option,
            }
            for index, manifest, option in zip(indexes, manifests, options, strict=True)
        ],
    }


def write_mask(indexes: list[Index], path: str) -> dict[str, int]:
    """The mask of all inputs end to end. Gives the manifest's entry."""
    writer = MaskWriter(path)
    with writer.file:
        for index in indexes:
            if index.mask is None:
                writer.add_all(index.num_tokens)
                continue
            for piece in pieces(index.num_tokens):
                writer.add(index.mask.bits(piece.start, piece.stop - piece.start))
        return writer.complete()


def copy_tokens(index: Index, output: BinaryIO) -> None:
    """Appends a .bin."""
    before = output.tell()
    with open(f"{index.prefix}.bin", "rb") as source:
        shutil.copyfileobj(source, output, _COPY_BYTES)
    expected = index.num_tokens * index.dtype.itemsize
    if output.tell() - before != expected:
        raise ConfigError(
            f"{index.prefix}.bin changed while it was read: {output.tell() - before} bytes instead of "
            f"{expected}. Merge again when nothing writes to it."
        )


def rename(prefix: str, temporary: dict[str, str]) -> None:
    """Gives the files their final names. What was there before of .idx, manifest and mask goes first: none of them ever
    stands beside newer data."""
    for suffix in (".idx", ".json", ".mask"):
        Path(f"{prefix}{suffix}").unlink(missing_ok=True)
    for suffix, path in temporary.items():
        if os.path.exists(path):
            os.replace(path, f"{prefix}{suffix}")
