"""What a run directory says about its run, whole or in progress; any of the files may be missing."""

from array import array
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_lrc.config import Config, ConfigError, load_yaml
from megatron_lrc.train.jsonl import read_records
from megatron_lrc.train.starts import STARTS_FILE


@dataclass(slots=True)
class RunFiles:
    """records: metrics.jsonl, `clone_by_layer` taken out of them: term -> a row of layers for each record, NaN where
    it is off, empty where the record has none. checkpoints: their steps."""

    path: Path
    records: list[dict[str, Any]]
    clone_by_layer: dict[str, list[array]]
    validations: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    checkpoints: list[int]
    config: Config | None = None
    config_text: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last one that anything is known of."""
        last = self.records[-1]["step"] if self.records else 0
        return max([last, *self.checkpoints, *(start["step"] for start in self.starts[-1:])])

    @property
    def train_iters(self) -> int | None:
        """How many steps the run is to take, if that is known."""
        for start in reversed(self.starts):
            if start.get("train_iters"):
                return start["train_iters"]
        return self.config.training.train_iters or None if self.config else None

    @property
    def is_finished(self) -> bool:
        return self.train_iters is not None and self.step >= self.train_iters

    @property
    def lost_steps(self) -> int:
        return sum(start.get("lost_steps") or 0 for start in self.starts)

    @property
    def lost_seconds(self) -> float:
        return sum(start.get("lost_seconds") or 0.0 for start in self.starts)

    def seconds_since(self, now: datetime) -> float | None:
        """Since the last record was written."""
        last = parse_time(self.records[-1].get("time")) if self.records else None
        return (now - last).total_seconds() if last else None

    def wall_seconds(self) -> float | None:
        """From the first start to the last record, pauses between the starts included."""
        first = parse_time(self.starts[0].get("time")) if self.starts else None
        last = parse_time(self.records[-1].get("time")) if self.records else None
        return (last - first).total_seconds() if first and last else None

    def tokens_at(self, step: int) -> float:
        """Tokens trained on after a step, between records by proportion."""
        before = (0, 0)
        for record in self.records:
            after = record["step"], record["tokens"]
            if after[0] >= step:
                return before[1] + (after[1] - before[1]) * (step - before[0]) / max(after[0] - before[0], 1)
            before = after
        return float(before[1])


def read_run(path: Path) -> RunFiles:
    """Read a run directory; a ConfigError if it is none."""
    found = [file for file in path.glob("iter_*/run.json") if file.parent.name.removeprefix("iter_").isdecimal()]
    known = [path / "metrics.jsonl", path / "validation.jsonl", path / STARTS_FILE]
    if not path.is_dir() or not (found or any(file.is_file() for file in known)):
        what = "holds no run" if path.is_dir() else "is not a directory"
        raise ConfigError(
            f"{path} {what}: expected is what --save named, with metrics.jsonl, {STARTS_FILE} or iter_NNNNNNN in it. "
            "Give that directory."
        )
    run = RunFiles(
        path=path,
        records=[],
        clone_by_layer={},
        validations=list(read_records(path / "validation.jsonl")),
        evaluations=[one for one in read_records(path / "evaluations.jsonl") if isinstance(one.get("tokens"), int)],
        starts=list(read_records(path / STARTS_FILE)),
        checkpoints=sorted(int(file.parent.name.removeprefix("iter_")) for file in found),
    )
    for record in read_records(path / "metrics.jsonl"):
        if isinstance(record.get("tokens"), int):
            _add_record(run, record)
    _read_config(run)
    return run


def _add_record(run: RunFiles, record: dict[str, Any]) -> None:
    given = {term: row for term, row in record.pop("clone_by_layer", {}).items() if isinstance(row, list)}
    for term in {*run.clone_by_layer, *given}:
        rows = run.clone_by_layer.setdefault(term, [array("f")] * len(run.records))
        rows.append(array("f", given.get(term, [])))
    run.records.append(record)


def _read_config(run: RunFiles) -> None:
    file = run.path / "config.yaml"
    try:
        run.config_text = file.read_text(encoding="utf-8")
        run.config = load_yaml(file)
    except OSError:
        run.notes.append("There is no config.yaml to read.")
    except (ConfigError, UnicodeDecodeError) as error:
        run.notes.append(f"config.yaml is of another version or damaged: {error}")


def parse_time(text: Any) -> datetime | None:
    """With its time zone; UTC where it names none."""
    try:
        time = datetime.fromisoformat(text)
        return time if time.tzinfo else time.replace(tzinfo=timezone.utc)
    except (ValueError, TypeError):
        return None
