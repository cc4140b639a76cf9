"""Folders that are complete or absent: written under a hidden name beside the final one, renamed at the end."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lrc.config import ConfigError
from megatron_lrc.hf.teacher import WEIGHT_FILES

#: What makes a tokenizer, a chat format and generation defaults; copied as it is.
COPIED_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def copy_files(source: Path, target: Path, names: Iterable[str] = COPIED_FILES) -> None:
    """Copy those of `names` that `source` has."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@contextmanager
def complete_or_absent(output: Path, *, source: Path, force: bool | None = None) -> Iterator[Path]:
    """A directory beside `output` to write into: renamed to it when the block ends well, deleted when it does not.

    force: replace an earlier export; None where there is no --force. What holds `source` is never replaced.
    """
    output = output.resolve()
    _check_output(output, source=source.resolve(), force=force)
    partial, replaced = (output.with_name(f".{output.name}.{suffix}") for suffix in ("partial", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
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
    is_model = (output / "config.json").is_file() and any((output / name).is_file() for name in WEIGHT_FILES)
    if not is_model or output in (source, *source.parents):
        raise ConfigError(
            f"--output {output} is not an earlier export (no config.json and safetensors in it, or it holds the "
            "teacher), so --force does not replace it. Give another directory."
        )
