"""A teacher's weights, read from a megatron-core distributed checkpoint that tools/convert_from_hf.py wrote.

    DIR/                     config.json, tokenizer and generation files of the Hugging Face model, unchanged
        megatron_lrc.json    which model that is, and which files the conversion wrote
        release/             the checkpoint, under the name that Megatron-LM gives to converted weights

`CheckpointReader` gives the same tensors as `TeacherReader`. Each rank reads the stored pieces that its slice
overlaps; no process group is needed. Opening checks that everything is there and belongs together.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_lrc.checkpoints.boxes import read_box, take
from megatron_lrc.checkpoints.index import INDEX_FILE, UnsafeCheckpoint, read_index
from megatron_lrc.checkpoints.layout import Box, box_of, rows_box, stored_shapes
from megatron_lrc.clone.sites import HeadLayout, Site
from megatron_lrc.config import ConfigError
from megatron_lrc.hf.content_hash import PREFIX, hash_files
from megatron_lrc.hf.families import TeacherDescription, config_digest
from megatron_lrc.hf.reader import Contents, Reader
from megatron_lrc.hf.sampled_hash import is_sampled, sampled_files
from megatron_lrc.hf.teacher import WEIGHT_FILES, TeacherReader
from megatron_lrc.hf.teacher_checks import CHECKPOINT_FOLDER
from megatron_lrc.json_files import read_json
from megatron_lrc.plain_files import file_beside

RECORD_FILE = "megatron_lrc.json"


@dataclass(frozen=True, slots=True)
class Record:
    """megatron_lrc.json.

    fingerprint: the teacher's, with any form of it. files: sizes in bytes, of all in release/. files_sha256: what
    they hold (`FileContents.sha256`). sampled_fingerprint: `Reader.sampled_fingerprint`. suspicious:
    `Reader.suspicious`, of the source. samples_sha256: only of earlier versions, which had no files_sha256.
    """

    fingerprint: str
    config_sha256: str
    files: dict[str, int]
    files_sha256: dict[str, str] = field(default_factory=dict)
    sampled_fingerprint: str = ""
    suspicious: list[str] = field(default_factory=list)
    samples_sha256: str = ""

    @classmethod
    def of(
        cls,
        folder: Path,
        *,
        fingerprint: str,
        config_values: Mapping,
        sampled_fingerprint: str = "",
        suspicious: Sequence[str] = (),
    ) -> "Record":
        contents = hash_files(sorted(folder.iterdir()))
        return cls(
            fingerprint,
            config_digest(config_values),
            {path.name: found.size for path, found in contents.items()},
            {path.name: found.sha256 for path, found in contents.items()},
            sampled_fingerprint,
            list(suspicious),
        )

    @property
    def is_sampled(self) -> bool:
        """Whether an earlier version wrote it."""
        return not self.files_sha256

    def write(self, directory: Path) -> None:
        (directory / RECORD_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


class CheckpointReader(Reader):
    """The open checkpoint of one teacher. Making one runs `check`."""

    def __init__(self, description: TeacherDescription) -> None:
        self.description = description
        self._heads = HeadLayout.of(description.shape)
        self._folder = description.directory / CHECKPOINT_FOLDER
        self._record = _read_record(description)
        self._check_files()
        try:
            index = read_index(self._folder)
        except UnsafeCheckpoint as error:
            raise ConfigError(f"{error}. Copy or convert it again.") from error
        self._stored = {
            key: entry for key, entry in index.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        }
        self._files = FileSystemReader(self._folder)
        self._files.set_up_storage_reader(index, is_coordinator=True)
        self._last: tuple[Box, Tensor] | None = None  # q, k and v lie in one box
        self.check()

    def check(self) -> None:
        """ConfigError unless the checkpoint holds exactly the tensors that config.json implies."""
        expected = stored_shapes(self.description.shape)
        problems = [f"{key} {list(expected[key])} is missing" for key in expected if key not in self._stored]
        for key, stored in self._stored.items():
            if key not in expected:
                problems.append(f"unexpected tensor {key}")
            elif tuple(stored.size) != expected[key]:
                problems.append(f"{key} has shape {list(stored.size)}, expected {list(expected[key])}")
        self._refuse(problems, remedy="Put back the config.json of the conversion, or convert again.")

    @property
    def files(self) -> list[Path]:
        return [self._folder / name for name in sorted(self._record.files)]

    def fingerprint(self, contents: Contents | None = None) -> str:
        """That of the Hugging Face directory that was converted: both forms are one teacher. Another one if
        its values were rounded, or if config.json is no longer the same."""
        if not self._record.is_sampled:
            self._check_contents(hash_files(self.files) if contents is None else contents)
        return self._with_config(self._record.fingerprint)

    def sampled_fingerprint(self) -> str:
        noted = self._record.fingerprint if self._record.is_sampled else self._record.sampled_fingerprint
        return self._with_config(noted) if noted else ""

    def suspicious(self, contents: Contents) -> list[str]:
        return self._record.suspicious

    def _rows(self, site: Site, start: int, count: int) -> Tensor:
        return self._read(rows_box(self.description.shape, site, start, count))

    def _part(self, name: str, layer: int | None, rank: int, size: int) -> Tensor:
        box = box_of(self.description.shape, name, layer, part=rank, parts=size)
        return take(name, self._read(box), box, self._heads)

    def _whole(self, name: str, layer: int | None) -> Tensor:
        return self._read(box_of(self.description.shape, name, layer))

    def _place(self, key: str) -> str:
        return f"{key} in {self._folder}"

    def _read(self, box: Box) -> Tensor:
        """What lies in a box [*box.local_shape], in the stored dtype."""
        if self._last is not None and self._last[0] == box:
            return self._last[1]
        tensor = read_box(self._files, self._stored[box.key], box)
        self._last = (box, tensor) if len(box.names) > 1 else None
        return tensor

    def _check_files(self) -> None:
        """Refuse a checkpoint whose files are not those that were written."""
        for name, size in self._record.files.items():
            path, fault = self._folder / name, ""
            try:
                if (found := file_beside(self._folder, name).stat().st_size) != size:
                    fault = f"{path} has {found} bytes, {size} were written"
            except FileNotFoundError:
                fault = f"{path} is missing"
            except ValueError as error:
                fault = f"{RECORD_FILE} {error}"
            if fault:
                raise ConfigError(f"{self.description.given}: {fault}. Copy or convert it again.")
        if self._record.is_sampled and sampled_files(self._folder, self._record.files) != self._record.samples_sha256:
            self._refuse_contents("the files")

    def _check_contents(self, contents: Contents) -> None:
        """Refuse a checkpoint whose files hold anything but what was written, by every byte."""
        written = self._record.files_sha256
        if changed := [path.name for path, found in contents.items() if written.get(path.name) != found.sha256]:
            self._refuse_contents(", ".join(changed))

    def _refuse_contents(self, which: str) -> NoReturn:
        raise ConfigError(
            f"{self.description.given}: {which} in {CHECKPOINT_FOLDER}/ are not what the "
            "conversion wrote. Copy them again, or convert the Hugging Face directory again."
        )

    def _with_config(self, fingerprint: str) -> str:
        """Another one where config.json is not the one that was converted, of the same kind."""
        config = self.description.config_fingerprint
        if config == self._record.config_sha256:
            return fingerprint
        kind = "" if is_sampled(fingerprint) else PREFIX
        return kind + hashlib.sha256(f"{fingerprint} {config}".encode()).hexdigest()


def open_teacher(description: TeacherDescription) -> Reader:
    """The reader of what the directory holds: safetensors, or a converted checkpoint."""
    return CheckpointReader(description) if is_converted(description) else TeacherReader(description)


def is_converted(description: TeacherDescription) -> bool:
    """Whether the directory holds no safetensors, so that its weights are in the checkpoint."""
    return not any((description.directory / name).is_file() for name in WEIGHT_FILES)


def _read_record(description: TeacherDescription) -> Record:
    path = description.directory / RECORD_FILE
    try:
        record = Record(**read_json(path))
        assert all(Path(name).name == name and isinstance(size, int) for name, size in record.files.items())
        assert INDEX_FILE in record.files and record.files_sha256.keys() in ({}.keys(), record.files.keys())
        assert all(isinstance(what, str) for what in (record.fingerprint, *record.suspicious))
    except (OSError, ValueError, TypeError, AttributeError, AssertionError):
        raise ConfigError(
            f"{description.given} holds a checkpoint, but {RECORD_FILE}, which tools/convert_from_hf.py "
            "writes beside it, is missing or damaged. Give a directory that this tool has written, or the "
            "Hugging Face directory."
        ) from None
    return record
