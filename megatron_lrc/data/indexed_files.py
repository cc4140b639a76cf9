"""Opens an indexed dataset and says whether it is whole.

megatron-core answers a bad file with an assertion or reads past its end. `read_indexed_file` compares header
and sizes; `read_index` looks at every entry of the .idx, and `check_token_ids` at the whole .bin. All reading
is in pieces: memory does not grow with the dataset.

    .idx   9 bytes b"MMIDIDX\\0\\0" | version u64 = 1 | dtype code u8 | sequences u64 | documents + 1 u64
           | length of each sequence i32 | its byte offset in the .bin i64 | first sequence of each document i64
    .bin   all token ids end to end
"""

import difflib
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from megatron_lrc.config import ConfigError
from megatron_lrc.data.assistant_masks import AssistantMask, check_entry, open_mask
from megatron_lrc.data.loaded_tokenizer import TokenizerIdentity
from megatron_lrc.data.mapped_files import map_array
from megatron_lrc.json_files import Unreadable, read_object
from megatron_lrc.os_errors import explained

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
TOKEN_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_COUNTS = struct.Struct("<QQ")  # end of the header: sequences, documents + 1
_PIECE = 1 << 22  # entries of the .idx, or token ids, looked at together
#: Of the entries of a manifest that are not looked at otherwise: what they may be, if they are there.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("documents", "tokens", "empty_documents", "bad_lines"), (int,)),
    **{"rows": (dict,), "sources": (list,), "options": (dict, type(None)), "dtype": (str, type(None))},
}
_KINDS_OF_TOKENIZER: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "type"), (str, type(None))),
    "tiktoken": (dict, type(None)),
}
_KINDS_OF_OPTIONS: dict[str, tuple[type, ...]] = {"filters": (list, type(None)), "max_tokens": (int, type(None))}
_REMEDY = "Copy both files again, or write the dataset again with tools/preprocess_data.py."


@dataclass(frozen=True, kw_only=True)
class IndexedFile:
    """What the .idx of one dataset says."""

    prefix: str
    dtype: numpy.dtype
    lengths: numpy.ndarray  # [sequences], int32: tokens of each sequence; memory-mapped
    manifest: dict[str, Any] | None

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=numpy.int64))

    @cached_property
    def tokens(self) -> numpy.ndarray:
        """[num_tokens]: the .bin, memory-mapped."""
        return map_array(f"{self.prefix}.bin", self.dtype, (self.num_tokens,))

    @cached_property
    def mask(self) -> AssistantMask | None:
        """Which tokens count in the losses, or None: all. ConfigError where the file is another dataset's."""
        return open_mask(self.prefix, self.manifest, self.num_tokens)

    def documents(self, bounds: tuple[float, float]) -> range:
        """The documents of a part, cut where megatron-core's BlendedMegatronDatasetBuilder cuts."""
        return range(*(int(round(bound * float(len(self.lengths)))) for bound in bounds))

    def part(self, bounds: tuple[float, float]) -> numpy.ndarray:
        """The lengths within a part."""
        documents = self.documents(bounds)
        return self.lengths[documents.start : documents.stop]


@dataclass(frozen=True, kw_only=True)
class Index(IndexedFile):
    """All of an .idx, memory-mapped."""

    pointers: numpy.ndarray  # [sequences], int64: byte offset of each sequence in the .bin
    bounds: numpy.ndarray  # [documents + 1], int64: first sequence of each document, then the number of sequences

    @property
    def num_documents(self) -> int:
        return len(self.bounds) - 1

    def document(self, number: int) -> numpy.ndarray:
        """[tokens of the document]: its token ids, the sequences joined."""
        first, last = int(self.bounds[number]), int(self.bounds[number + 1])
        count = int(self.lengths[first:last].sum(dtype=numpy.int64))
        start = int(self.pointers[first]) // self.dtype.itemsize
        return self.tokens[start : start + count]


def pieces(length: int) -> Iterator[slice]:
    """Slices that cover `length` entries, few enough at a time to hold in memory."""
    return (slice(start, min(start + _PIECE, length)) for start in range(0, length, _PIECE))


@explained()
def read_indexed_file(prefix: str) -> IndexedFile:
    """Reads the .idx (lengths memory-mapped) and compares the sizes of both files with it. ConfigError also for what
    the system refuses (`os_errors.py`)."""
    idx_path, bin_path = f"{prefix}.idx", f"{prefix}.bin"
    for path in (idx_path, bin_path):
        if not _is_file(path):
            raise ConfigError(
                f"There is no {path}{_similar(prefix)}. A dataset is named by its prefix, PREFIX of PREFIX.bin and "
                "PREFIX.idx: correct the data path, or write the dataset with tools/preprocess_data.py."
            )
    with open(idx_path, "rb") as file:
        header = file.read(HEADER.size)
    fields = HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0, 0, 0, 0)
    magic, version, dtype_code, num_sequences, num_bounds = fields
    if magic != MAGIC or version != 1 or dtype_code not in TOKEN_DTYPES:
        raise ConfigError(
            f"{idx_path} is not an index of megatron-core's format (header {header[:9]!r}). Write it with "
            "tools/preprocess_data.py."
        )
    if num_sequences == 0:
        raise ConfigError(f"{idx_path} holds no document. Write it again from text with tools/preprocess_data.py.")
    _check_size(idx_path, HEADER.size + 12 * num_sequences + 8 * num_bounds, "its header says", may_be_longer=True)
    lengths = map_array(idx_path, numpy.int32, (num_sequences,), HEADER.size)
    dtype = numpy.dtype(TOKEN_DTYPES[dtype_code])
    _check_size(bin_path, int(lengths.sum(dtype=numpy.int64)) * dtype.itemsize, f"{idx_path} says")
    return IndexedFile(prefix=prefix, dtype=dtype, lengths=lengths, manifest=_read_manifest(prefix, lengths))


def _similar(prefix: str) -> str:
    """The end of a sentence, where beside `prefix` there is a dataset that was probably meant: a file of it was named,
    or preprocess_data.py's --output-prefix, to which it has added the key of the text."""
    folder, name = os.path.split(prefix)
    if not os.path.isdir(folder or "."):
        return ""
    known = sorted(path.removesuffix(".idx") for path in os.listdir(folder or ".") if path.endswith(".idx"))
    of_file = [other for other in known if name.removeprefix(other) in (".bin", ".idx", ".json", ".mask")]
    of_prefix = [other for other in known if other.startswith(f"{name}_")]
    close = of_file or of_prefix or difflib.get_close_matches(name, known, n=1)
    return f"; was {' or '.join(os.path.join(folder, other) for other in close[:3])} meant?" if close else ""


def _is_file(path: str) -> bool:
    """os.path.isfile calls absent what it may not look at."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _check_size(path: str, expected: int, who_says: str, *, may_be_longer: bool = False) -> None:
    size = os.path.getsize(path)
    if size < expected or (size > expected and not may_be_longer):
        raise ConfigError(
            f"{path} has {size} bytes where {who_says} {expected}: it is truncated or belongs to another "
            "dataset. Copy it again, or write the dataset again with tools/preprocess_data.py."
        )


def _read_manifest(prefix: str, lengths: numpy.ndarray) -> dict[str, Any] | None:
    """The manifest beside an .idx, or None if there is no such file."""
    path = f"{prefix}.json"
    if not _is_file(path):
        return None
    try:
        manifest = read_object(Path(path))
        documents, tokens = manifest["documents"], manifest["tokens"]
        identity_of(manifest)
        _check_kinds(manifest, _KINDS)
        check_entry(manifest)
        _check_kinds(manifest["tokenizer"], _KINDS_OF_TOKENIZER)
        _check_kinds(manifest.get("options") or {}, _KINDS_OF_OPTIONS)
        _check_kinds(manifest.get("rows", {}), dict.fromkeys(manifest.get("rows", {}), (int,)))
    except Unreadable:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a manifest of tools/preprocess_data.py ({error}). Move it away, or write the dataset again."
        ) from error
    found = (len(lengths), int(lengths.sum(dtype=numpy.int64)))
    if found != (documents, tokens):
        raise ConfigError(
            f"{path} describes {documents} documents with {tokens} tokens, but {prefix}.idx has {found[0]} "
            f"with {found[1]}. The files belong to different datasets: copy all three again, or write the "
            "dataset again."
        )
    return manifest


def _check_kinds(values: dict[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> None:
    """TypeError where an entry that is there is of another kind than whoever reads it expects."""
    for name, kind in kinds.items():
        if name in values and not isinstance(values[name], kind):
            raise TypeError(f"{name} is of another kind")


def identity_of(manifest: dict[str, Any]) -> TokenizerIdentity:
    """The tokenizer that a manifest names. KeyError, TypeError where it names none."""
    tokenizer = manifest["tokenizer"]
    identity = TokenizerIdentity(
        fingerprint=tokenizer["fingerprint"],
        vocab_size=tokenizer["vocab_size"],
        eod=tokenizer["eod"],
        kind=tokenizer.get("kind", "tokenizers"),
        probes=tokenizer.get("probes", ""),
    )
    texts, numbers = (identity.fingerprint, identity.kind, identity.probes), (identity.vocab_size, identity.eod or 0)
    if not (all(isinstance(one, str) for one in texts) and all(type(one) is int for one in numbers)):
        raise TypeError("the tokenizer's entries are of other kinds")
    return identity


@explained()
def read_index(prefix: str, *, allow_empty_documents: bool = False) -> Index:
    """Reads an .idx and checks every entry. Raises a ConfigError that names the file and what is wrong with it.

    allow_empty_documents: Megatron-LM's own tool makes a document without a sequence of a line without text;
    training reads sequences and does not mind. Where there is a manifest, there are none.
    """
    file = read_indexed_file(prefix)
    path, lengths = f"{prefix}.idx", file.lengths
    start = HEADER.size
    with open(path, "rb") as stream:
        stream.seek(start - _COUNTS.size)
        num_sequences, num_bounds = _COUNTS.unpack(stream.read(_COUNTS.size))
    expected = start + 12 * num_sequences + 8 * num_bounds
    if num_bounds < 2 or os.path.getsize(path) != expected:
        raise ConfigError(
            f"{path} has {os.path.getsize(path)} bytes where its header says {expected} ({num_sequences} "
            f"sequences, {num_bounds - 1} documents): the header is damaged or something was appended. "
            f"{_REMEDY}"
        )
    start += lengths.nbytes
    pointers = map_array(path, numpy.int64, (num_sequences,), start)
    bounds = map_array(path, numpy.int64, (num_bounds,), start + pointers.nbytes)
    index = Index(
        prefix=prefix, dtype=file.dtype, lengths=lengths, manifest=file.manifest, pointers=pointers, bounds=bounds
    )
    _check_manifest(index)
    _check_sequences(index)
    _check_documents(index, may_be_empty=allow_empty_documents and file.manifest is None)
    return index


@explained()
def check_token_ids(index: Index, vocab_size: int | None) -> int:
    """Looks at every token id: none below 0, none at or above `vocab_size` (None: not known). Gives the largest."""
    position = largest = 0
    with open(f"{index.prefix}.bin", "rb") as stream:
        while len(ids := numpy.fromfile(stream, index.dtype, _PIECE)):
            largest = max(largest, int(ids.max()))
            if int(ids.min()) < 0 or (vocab_size is not None and largest >= vocab_size):
                is_wrong = ids < 0 if vocab_size is None else (ids < 0) | (ids >= vocab_size)
                first = int(numpy.argmax(is_wrong))
                known = "are not negative" if vocab_size is None else f"are 0 to {vocab_size - 1}"
                raise ConfigError(
                    f"{index.prefix}.bin holds token id {int(ids[first])} at position {position + first}, "
                    f"but the tokenizer's ids {known}: the file is damaged, or another tokenizer made it. "
                    f"{_REMEDY}"
                )
            position += len(ids)
    return largest


def _check_manifest(index: Index) -> None:
    """It has the same dtype: uint16 and int16 are told apart by nothing else."""
    if index.manifest is None:
        return
    said, found = index.manifest.get("dtype"), index.dtype.name
    if said not in (None, found):
        raise ConfigError(
            f"The header of {index.prefix}.idx says {found}, but {index.prefix}.json says {said}: one of "
            f"them is damaged or belongs to another dataset. {_REMEDY}"
        )


def _check_sequences(index: Index) -> None:
    """No negative length; every sequence begins where the one before it ends, so that none leaves the .bin."""
    position, itemsize = 0, index.dtype.itemsize
    for piece in pieces(len(index.lengths)):
        lengths, pointers = index.lengths[piece].astype(numpy.int64), index.pointers[piece]
        if lengths.min() < 0:
            wrong = int(numpy.argmax(lengths < 0))
            raise ConfigError(
                f"{index.prefix}.idx gives sequence {piece.start + wrong} a length of {lengths[wrong]}: it "
                f"is damaged. {_REMEDY}"
            )
        ends = position + numpy.cumsum(lengths) * itemsize
        starts = ends - lengths * itemsize
        if (pointers != starts).any():
            wrong = int(numpy.argmax(pointers != starts))
            size = os.path.getsize(f"{index.prefix}.bin")
            outside = "" if 0 <= pointers[wrong] <= size else f", outside the {size} bytes of {index.prefix}.bin"
            raise ConfigError(
                f"{index.prefix}.idx points to byte {pointers[wrong]} for sequence "
                f"{piece.start + wrong}{outside}; the lengths before it say {starts[wrong]}. {_REMEDY}"
            )
        position = int(ends[-1])


def _check_documents(index: Index, *, may_be_empty: bool) -> None:
    """The documents' first sequences begin at 0, ascend, and end at the number of sequences."""
    bounds, num_sequences = index.bounds, len(index.lengths)
    if bounds[0] != 0 or bounds[-1] != num_sequences:
        raise ConfigError(
            f"The documents of {index.prefix}.idx cover sequences {bounds[0]} to {bounds[-1]} where there "
            f"are 0 to {num_sequences}: it is damaged. {_REMEDY}"
        )
    for piece in pieces(index.num_documents):
        begins, ends = bounds[piece], bounds[piece.start + 1 : piece.stop + 1]
        is_wrong = ends < begins if may_be_empty else ends <= begins
        if is_wrong.any():
            wrong = int(numpy.argmax(is_wrong))
            raise ConfigError(
                f"Document {piece.start + wrong} of {index.prefix}.idx begins at sequence {begins[wrong]} "
                f"and ends at {ends[wrong]}, so that it holds none: the file is damaged. {_REMEDY}"
            )
