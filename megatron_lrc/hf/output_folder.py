"""Folders that are complete or absent: written under a hidden name beside the final one, renamed at the end."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lrc.config import ConfigError
from megatron_lrc.hf.teacher import WEIGHT_FILES

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
