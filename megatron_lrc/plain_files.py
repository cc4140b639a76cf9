"""Names of files out of an index that somebody else may have written: they mean files beside the index, no others.

`folder / name` leaves the folder where the name has a separator, is `..`, begins with a root, or is a link.
"""

import stat
from pathlib import Path


def file_beside(folder: Path, name: object) -> Path:
    """The regular file of this name in the folder; FileNotFoundError where there is none.

    ValueError for anything else: a path, a folder, a pipe, a link to a file elsewhere. The links of the Hugging Face
    Hub's cache stay, from snapshots/REVISION into the blobs/ of the same model.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(f"names the file {str(name)[:200]!r}, where plain file names beside it are expected")
    path = folder / name
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise
    except OSError as error:  # a name too long for any file, a folder that may not be entered
        raise ValueError(f"names {name[:200]}, which cannot be opened ({error.strerror})") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"names {name}, which is no regular file")
    if path.is_symlink() and path.resolve().parent not in _own_folders(folder.resolve()):
        raise ValueError(f"names {name}, which is a link to {path.resolve()}, outside of its folder")
    return path


def _own_folders(folder: Path) -> list[Path]:
    of_the_hub = [folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
    return [folder, *of_the_hub]
