"""Folders that are complete or absent: written under a hidden name beside the final one, renamed at the end."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from megatron_lrc import __version__
from megatron_lrc.checkpoints.files import FileSum
from megatron_lrc.config import ConfigError
from megatron_lrc.json_files import read_json
from megatron_lrc.locks import FileLock

#: Of an export: what it has written, so that --force replaces nothing else.
MANIFEST = "megatron_lrc_export.json"

#: What makes a tokenizer, chat formats and generation defaults, as patterns; copied as it is. Not what a processor of
#: images or sound needs (processor_config.json, preprocessor_config.json): models here are of text only.
COPIED_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer.model*",  # also Mistral's tokenizer.model.v3
    "tekken.json",
    "*.tiktoken",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)


def copy_files(source: Path, target: Path, patterns: Iterable[str] = COPIED_FILES) -> None:
    """Copy the files of `source` that any of these patterns means, to the same place in `target`."""
    for path in {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


@contextmanager
def complete_or_absent(output: Path, *, source: Path, force: bool | None = None) -> Iterator[Path]:
    """A directory beside `output` to write into: renamed to it when the block ends well, deleted when it does not.

    force: replace an earlier export; None where there is no --force. What holds `source` is never replaced.
    """
    output, source = output.resolve(), source.resolve()
    partial, replaced, lock = (output.with_name(f".{output.name}.{end}") for end in ("partial", "replaced", "lock"))
    with FileLock(lock, place=f"--output {output}", remedy="Wait until it is done, or give another directory."):
        if replaced.exists() and not output.exists():
            replaced.rename(output)  # an export that was killed between its two renamings
        _check_output(output, source=source, force=force)
        shutil.rmtree(partial, ignore_errors=True)  # of one that was killed before
        partial.mkdir(parents=True)
        try:
            yield partial
            _check_output(output, source=source, force=force)  # which somebody may have made meanwhile
            if output.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                output.rename(replaced)
            partial.rename(output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if replaced.exists() and not output.exists():
                replaced.rename(output)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def _check_output(output: Path, *, source: Path, force: bool | None) -> None:
    """Refuse to lose anything but an earlier export, and that only by --force."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file. A directory to create is expected. Give another name.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not force:
        remedy = "" if force is None else ", or --force to replace it"
        raise ConfigError(f"--output {output} is not empty. Give another directory{remedy}.")
    if not (output / MANIFEST).is_file() or output in (source, *source.parents):
        raise ConfigError(
            f"--output {output} is not an earlier export (no {MANIFEST} in it, or it holds the teacher), so --force "
            "does not replace it. Give another directory, or remove it."
        )
    if foreign := find_foreign(output):
        raise ConfigError(
            f"--output {output} holds {foreign}, which no export has written, or which is another since, so --force "
            "does not replace it. Move it away, or give another directory."
        )


def write_manifest(folder: Path) -> None:
    """List all files of an export, by which `find_foreign` knows them again."""
    files = {name: asdict(FileSum.of(path)) for name, path in _paths_in(folder).items() if path.is_file()}
    text = json.dumps({"megatron_lrc": __version__, "files": files}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def find_foreign(folder: Path) -> str | None:
    """A path in the folder of an export that the export did not write, or not with these contents."""
    try:
        files = {name: FileSum(**found) for name, found in read_json(folder / MANIFEST)["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return MANIFEST
    written = {MANIFEST} | {str(parent) for name in files for parent in PurePosixPath(name).parents}
    for name, path in _paths_in(folder).items():
        is_same = name in files and not path.is_symlink() and path.is_file() and FileSum.of(path) == files[name]
        if name not in written and not is_same:
            return name
    return None


def _paths_in(folder: Path) -> dict[str, Path]:
    """Files and folders, however deep, by their names from there."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
