"""Checksums of the files of a folder, kept in it: what was damaged since they were written does not go unnoticed.

The folder's own name is kept with them. It says what the files are, so files of one folder that were copied into
another, their checksums with them, do not pass there.

CRC-32 finds what disks and interrupted copies do to a file, at 4 GB/s on one core, so that the time is the disk's.
(SHA-256 would guard against intent too, which is not the question here, at less than half of that.)
"""

import json
import os
import zlib
from pathlib import Path

from megatron_lrc.config import ConfigError
from megatron_lrc.json_files import Unreadable, read_object
from megatron_lrc.os_errors import explained
from megatron_lrc.plain_files import file_beside

FILE_NAME = "checksums.json"


def write_checksums(folder: str, *, name: str) -> None:
    """Write the size in bytes and the CRC-32 of every file in the folder to checksums.json there.

    name: the last part of the path that the folder is going to have.
    """
    names = sorted(set(os.listdir(folder)) - {FILE_NAME})
    measured = {file: _measure(os.path.join(folder, file)) for file in names}
    with open(os.path.join(folder, FILE_NAME), "w", encoding="utf-8") as file:
        json.dump({"folder": name, "files": measured}, file, indent=1)


@explained()
def check_checksums(folder: str) -> None:
    """ConfigError if a file is missing or other than `write_checksums` has found it, or all are another folder's.
    Reads all of them."""
    for name, expected in _read(folder).items():
        path = os.path.join(folder, name)
        try:
            found = _measure(str(file_beside(Path(folder), name)))
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing. {_remedy(folder)}") from None
        except ValueError as error:
            raise ConfigError(f"{os.path.join(folder, FILE_NAME)} {error}. {_remedy(folder)}") from None
        if found != expected:
            raise ConfigError(f"{path} is damaged: its size or checksum is not what was written. {_remedy(folder)}")


def _read(folder: str) -> dict[str, list[int]]:
    path = os.path.join(folder, FILE_NAME)
    try:
        found = read_object(Path(path))
        owner, measured = found["folder"], dict(found["files"])
    except Unreadable:
        raise
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is missing or damaged. {_remedy(folder)}") from error
    if owner != os.path.basename(folder):
        raise ConfigError(f"{path} and the files beside it are those of another folder, {owner}. {_remedy(folder)}")
    return measured


def _measure(path: str) -> list[int]:
    size = checksum = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    return [size, checksum]


def _remedy(folder: str) -> str:
    return f"Remove {folder}; the next start builds it again."
