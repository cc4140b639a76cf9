"""A teacher's weights, read from safetensors slice by slice.

Every rank opens the same files and reads only its tensor parallel part of its own layers: none ever holds the
whole teacher. Opening checks first that each expected tensor is there in the shape that config.json implies,
nothing unexpected, no file cut short. Afterwards a read fails only with the disk or at values that are not
finite.

Tensors come in the files' dtype and in Hugging Face's row order; `sites.select` finds their place in
megatron-core's fused weights. Shapes: `D` teacher hidden, `v` vocabulary, `o` output features, `i` input
features, `/tp` split over ranks.
"""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lrc.checkpoints.layout import SITES
from megatron_lrc.clone.sites import LM_HEAD, Site
from megatron_lrc.config import ConfigError
from megatron_lrc.hf.content_hash import hash_files, root_of
from megatron_lrc.hf.families import TeacherDescription, Weight, by_tensor, expected_weights, tensor_shape
from megatron_lrc.hf.reader import Contents, Reader
from megatron_lrc.hf.sampled_hash import sampled_fingerprint
from megatron_lrc.json_files import read_json
from megatron_lrc.plain_files import file_beside

SINGLE_FILE, INDEX_FILE = WEIGHT_FILES = "model.safetensors", "model.safetensors.index.json"

#: safetensors dtypes that weights may have; anything else is a quantised format.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

_ELEMENTS_KEPT = 2**25  # read from the files before they are opened anew


class TeacherReader(Reader):
    """The open files of one teacher. Making one runs `check`."""

    def __init__(self, description: TeacherDescription) -> None:
        self.description = description
        self._files = open_files(description.directory)
        self._elements_read = 0
        self._file_of = locate(description.directory, self._files)
        self._weights = {
            weight.key: weight for weight in expected_weights(description.family, description.shape)
        }  # a tied teacher's LM head is its embedding, even where the file repeats it
        self.check()

    def check(self) -> None:
        """ConfigError unless the files hold exactly the tensors that config.json implies."""
        family, problems = self.description.family, []
        expected = by_tensor(self._weights.values())
        tied_head = family.sites["lm_head"] if self.description.shape.is_tied else None
        for name, parts in expected.items():
            problems += self._problems_of(name, parts)
        for name, file in self._file_of.items():
            if name not in expected and name != tied_head and not name.endswith(family.ignored_suffixes):
                problems.append(f"unexpected tensor {name} in {file}")
        whose = f" for {family.architecture}"
        self._refuse(problems, whose, remedy="Give a directory whose config.json and weights belong together.")
        if tied_head in self._file_of:
            self._check_repeated_head(tied_head)

    def read(self, name: str) -> Tensor:
        """The tensor of this Hugging Face name."""
        view = self._slice(name)
        self._count_read(math.prod(view.get_shape()))
        return view[:]

    def _read_weight(self, weight: Weight, split_dim: int | None = None, rank: int = 0, size: int = 1) -> Tensor:
        """It, or the `rank`-th of `size` equal parts of its `split_dim`."""
        view, starts, shape = self._slice(weight.name), [weight.first_row, *[0] * 3], list(weight.shape)
        if split_dim is not None:
            shape[split_dim], remainder = divmod(shape[split_dim], size)
            assert remainder == 0, f"{weight.name} {weight.shape} does not split into {size} along {split_dim}"
            starts[split_dim] += rank * shape[split_dim]
        self._count_read(math.prod(shape))
        return view[tuple(slice(start, start + length) for start, length in zip(starts, shape, strict=False))]

    def names(self) -> list[str]:
        """The Hugging Face names of the tensors."""
        return list(by_tensor(self._weights.values()))

    def dtype(self, key: str) -> torch.dtype:
        """The data type in which the files hold the weight of this key (`Weight.key`)."""
        return DTYPES[self._slice(self._weights[key].name).get_dtype()]

    @property
    def files(self) -> list[Path]:
        return [self.description.directory / name for name in sorted(self._files)]

    def fingerprint(self, contents: Contents | None = None) -> str:
        """Of config.json and every byte of the files. The same weights in other shards are another fingerprint."""
        return root_of(self.description.config_values, hash_files(self.files) if contents is None else contents)

    def sampled_fingerprint(self) -> str:
        return sampled_fingerprint(self.description.config_values, self.files)

    def _rows(self, site: Site, start: int, count: int) -> Tensor:
        view = self._slice(self._weights[site.name].name)
        self._count_read(count * self.description.shape.hidden_size)
        return view[start : start + count]

    def _part(self, name: str, layer: int | None, rank: int, size: int) -> Tensor:
        split_dim = SITES[name].split if name in SITES else 0
        return self._read_weight(self._weights[f"layers.{layer}.{name}"], split_dim, rank, size)

    def _whole(self, name: str, layer: int | None) -> Tensor:
        return self._read_weight(self._weights[name if layer is None else f"layers.{layer}.{name}"])

    def _place(self, key: str) -> str:
        name = self._weights[key].name
        return f"{name} in {self._file_of[name]}"

    def _slice(self, name: str):
        return self._files[self._file_of[name]].get_slice(name)

    def _count_read(self, num_elements: int) -> None:
        """Open the files anew after some reads: pages that were read stay in memory as long as their file is open."""
        self._elements_read += num_elements
        if self._elements_read > _ELEMENTS_KEPT:
            self._elements_read = 0
            self._files = {name: _open(self.description.directory / name) for name in self._files}

    def _problems_of(self, name: str, parts: list[Weight]) -> list[str]:
        weight, shape = parts[0], tensor_shape(parts)
        if name not in self._file_of:
            hint = " (config.json has tie_word_embeddings: false)" if weight.site == LM_HEAD else ""
            return [f"tensor {name} {list(shape)} is missing{hint}"]
        found, file = self._slice(name), self._file_of[name]
        if tuple(found.get_shape()) != shape:
            return [f"tensor {name} in {file} has shape {found.get_shape()}, expected {list(shape)}"]
        if found.get_dtype() not in DTYPES:
            return [f"tensor {name} in {file} has dtype {found.get_dtype()}, expected {', '.join(DTYPES)}"]
        if weight.is_zero and bool(found[:].any()):
            return [f"tensor {name} in {file} is not all zero, and a student has no place for it"]
        return []

    def _check_repeated_head(self, name: str) -> None:
        """A tied model's file may repeat the embedding as LM head; another matrix there contradicts config.json."""
        head, embedding = self._slice(name), self._slice(self.description.family.sites["embed"])
        is_alike = (head.get_shape(), head.get_dtype()) == (embedding.get_shape(), embedding.get_dtype())
        rows = 8192  # at a time: both matrices may be gigabytes
        starts = range(0, self.description.shape.vocab_size, rows)
        if not is_alike or not all(torch.equal(head[i : i + rows], embedding[i : i + rows]) for i in starts):
            raise ConfigError(
                f"{self.description.given}: config.json has tie_word_embeddings: true, but {name} in "
                f"{self._file_of[name]} differs from the embedding. One of them is wrong. Set "
                "tie_word_embeddings to false to keep this LM head, or delete the tensor."
            )


def _file_names(directory: Path) -> list[str]:
    """The safetensors files of a model: the single file, or those that the index names."""
    is_single, has_index = (directory / SINGLE_FILE).is_file(), (directory / INDEX_FILE).is_file()
    if is_single and not has_index:
        return [SINGLE_FILE]
    names = sorted(set(_weight_map(directory).values()))
    if is_single and names != [SINGLE_FILE]:  # transformers would take the one, some servers take the other
        raise ConfigError(
            f"{directory} holds {SINGLE_FILE} and a {INDEX_FILE} that names other files ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}): two sets of weights, and programs differ in which one they "
            "load. Move away what does not belong to the model."
        )
    for name in names:
        _check_name(directory, name)
    return names


def _check_name(directory: Path, name: str) -> None:
    try:
        file_beside(directory, name)
    except FileNotFoundError:
        raise ConfigError(
            f"{directory / INDEX_FILE} names {name}, which is not there. Download or copy the missing file."
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{directory / INDEX_FILE} {error}. Download the model again from a source you trust, or copy the file "
            "itself there."
        ) from None


def _weight_map(directory: Path) -> dict[str, str]:
    path, reason = directory / INDEX_FILE, ""
    try:
        weight_map = read_json(path)["weight_map"]
        is_valid = all(isinstance(file, str) for file in weight_map.values()) and len(weight_map) > 0
    except ValueError as error:
        is_valid, reason = False, f" ({error})"
    except (KeyError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise ConfigError(
            f'{path} is not a safetensors index{reason}: a JSON object with a "weight_map" is expected. Download it '
            "again."
        )
    return weight_map


def _open(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} ({path.stat().st_size} bytes) is not a complete safetensors file ({error}). Download or "
            "copy it again."
        ) from error


def files_of_tensors(directory: Path) -> dict[str, str]:
    """Tensor name -> name of the safetensors file that holds it. ConfigError as at the opening of a teacher."""
    return locate(directory, open_files(directory))


def open_files(directory: Path) -> dict:
    """Name -> open safetensors file: the single one, or those that the index names. ConfigError if one is damaged."""
    return {name: _open(directory / name) for name in _file_names(directory)}


def locate(directory: Path, files: dict) -> dict[str, str]:
    """Tensor name -> file, from the headers alone. An index is held against them and can change nothing.

    So it need not be in the fingerprint, and a name in two files, of which it would choose one, is refused.
    """
    file_of: dict[str, str] = {}
    for file, opened in files.items():
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            if name in file_of:
                raise ConfigError(
                    f"{directory} holds tensor {name} twice, in {file_of[name]} and in {file}: programs differ in "
                    "which one they load. Each tensor is expected in one file. Download the model again, or take one "
                    "of the two out."
                )
            file_of[name] = file
    for name, file in _weight_map(directory).items() if (directory / INDEX_FILE).is_file() else ():
        if file_of.get(name) != file:
            raise ConfigError(
                f"{directory / INDEX_FILE} places {name} in {file}, which does not hold it. Download both again."
            )
    return file_of
