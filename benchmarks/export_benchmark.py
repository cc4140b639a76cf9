"""`benchmark.py export`: time and memory of tools/convert_to_hf.py, against copying the files that it writes.

The export is a program of its own, as a user starts it: the start of Python and its imports count. The copy reads the
exported files, writes them elsewhere and brings them to disk; so does an export's time include the fsync of its
files. What is read lies in the page cache for both. A round is: the start alone; an export without verification, and a
copy of it; one with verification, and a copy of it.

Memory is resident memory of the exporting process, of which pages of files that it maps are a part.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.measure import Measured, Spread, measure, table, total_bytes
from benchmarks.measured_models import add_student_flags, add_teacher_flags, config_of, open_base
from benchmarks.naive import all_weights
from megatron_lrc.checkpoints.run_directory import newest_checkpoint
from megatron_lrc.config import ConfigError, validate_against_teacher
from megatron_lrc.hf.export import export_model
from megatron_lrc.hf.reader import Reader
from megatron_lrc.methods import method_of

ROOT = Path(__file__).resolve().parents[1]
TOOL = str(ROOT / "tools" / "convert_to_hf.py")
#: At most this many times the seconds of the copy; at most these many times the largest shard, and as many bytes more.
TARGET_SECONDS, TARGET_SHARDS, TARGET_BYTES = 3.0, 1.5, 1e9
PLAIN, VERIFIED = "export --no-verify", "export"
_SEQ_LENGTH, _PIECE = 16, 1 << 24


@dataclass(frozen=True)
class Copied:
    """Seconds of copying files: reading, writing (both to and from the page cache), fsync."""

    read: float
    write: float
    flush: float

    @property
    def seconds(self) -> float:
        return self.read + self.write + self.flush


@dataclass(frozen=True)
class Exported:
    """One export, the seconds of fsync after it, and the copy of what it wrote."""

    program: Measured
    flush: float
    copy: Copied

    @property
    def seconds(self) -> float:
        return self.program.seconds + self.flush

    @property
    def ratio(self) -> float:
        return self.seconds / self.copy.seconds


@dataclass(frozen=True)
class Round:
    """start: seconds of the tool until it would open the run."""

    start: float
    plain: Exported
    verified: Exported

    @property
    def rest(self) -> float:
        """What an export without verification takes beyond its start and the writing that the copy does too."""
        return self.plain.program.seconds - self.start - self.plain.copy.write

    @property
    def verifying(self) -> float:
        return self.verified.program.seconds - self.plain.program.seconds

    @property
    def ratio_without_start(self) -> float:
        return (self.plain.seconds - self.start) / self.plain.copy.seconds


@dataclass(frozen=True)
class Sizes:
    """Bytes: all that is exported and its largest weight file; what the export reads."""

    exported: int
    largest_shard: int
    num_shards: int
    checkpoint: int
    teacher: int

    @property
    def memory_bound(self) -> float:
        return TARGET_SHARDS * self.largest_shard + TARGET_BYTES


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_teacher_flags(parser)
    add_student_flags(parser)
    parser.add_argument("--folder", metavar="DIR", help="where to write (default: the folder for temporary files)")
    parser.add_argument("--json", metavar="FILE", help="also write every figure here (default: not)")


def run(arguments: argparse.Namespace, report: Callable[[str], None]) -> int:
    """0. ConfigError for what a training would refuse too, or where an export fails."""
    base, reader = open_base(arguments)
    values = vars(arguments) | {"teacher": str(base.directory), "seq_length": _SEQ_LENGTH}
    validate_against_teacher(method_of(config_of(argparse.Namespace(**values))), base.shape)
    with tempfile.TemporaryDirectory(dir=arguments.folder, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        teacher = Path(arguments.teacher).absolute() if arguments.teacher else folder / "teacher"
        if not arguments.teacher:
            write_teacher(reader, teacher, torch.bfloat16 if arguments.bf16 else torch.float32)
        checkpoint = make_checkpoint(arguments, teacher, folder)
        report("a teacher, and a student's checkpoint after one step: written")
        start_alone(folder)  # what is read from disk only once is not measured
        rounds = []
        for number in range(arguments.repeats):
            rounds.append(measure_round(folder))
            report(f"round {number + 1} of {arguments.repeats}")
        sizes = sizes_of(folder / "export", checkpoint, teacher)
    for line in summary(rounds, sizes):
        report(line)
    if arguments.json:
        content = {"arguments": vars(arguments), "cores": os.cpu_count(), "bytes": asdict(sizes)}
        content["rounds"] = [asdict(each) for each in rounds]
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def write_teacher(reader: Reader, output: Path, dtype: torch.dtype) -> None:
    """A Hugging Face directory of random weights."""
    weights = all_weights(reader)  # in the order in which they are asked for
    export_model(
        base=reader.description,
        shape=reader.description.shape,
        weight_of=lambda weight: next(weights)[1],
        dtype=dtype,
        output=output,
        arch="native",
        verify=False,
    )


def make_checkpoint(arguments: argparse.Namespace, teacher: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "benchmarks.saved_run", "--teacher", str(teacher)]
    command += ["--student-hidden-size", str(arguments.student_hidden_size), "--seq-length", str(_SEQ_LENGTH)]
    measure([*command, *(["--bf16"] if arguments.bf16 else []), "--save", str(folder / "run")], _environment())
    newest = newest_checkpoint(str(folder / "run"))
    assert newest is not None
    return newest


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def measure_round(folder: Path) -> Round:
    return Round(start_alone(folder), export_and_copy(folder, ["--no-verify"]), export_and_copy(folder, []))


def start_alone(folder: Path) -> float:
    """Seconds in which the tool starts, imports all that it uses, and finds that there is no such run."""
    command = [sys.executable, TOOL, "--load", str(folder / "none"), "--output", str(folder / "none")]
    start = time.perf_counter()
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode != 2:
        raise ConfigError(f"{TOOL} ended with exit code {done.returncode}, not 2, where there is no run: {done.stderr}")
    return seconds


def export_and_copy(folder: Path, flags: list[str]) -> Exported:
    output, copy = folder / "export", folder / "copy"
    for path in (output, copy):
        shutil.rmtree(path, ignore_errors=True)
    program = measure(
        [sys.executable, TOOL, "--load", str(folder / "run"), "--output", str(output), *flags], _environment()
    )
    start = time.perf_counter()
    for path in output.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    flush = time.perf_counter() - start
    return Exported(program, flush, copy_files(output, copy))


def copy_files(source: Path, target: Path) -> Copied:
    """Copy a folder of files, a piece at a time."""
    target.mkdir()
    read = write = flush = 0.0
    buffer = memoryview(bytearray(_PIECE))
    for path in sorted(source.iterdir()):
        with open(path, "rb", buffering=0) as given, open(target / path.name, "wb", buffering=0) as taken:
            start = time.perf_counter()
            while count := given.readinto(buffer):
                filled = time.perf_counter()
                assert taken.write(buffer[:count]) == count
                written = time.perf_counter()
                read, write, start = read + filled - start, write + written - filled, written
            os.fsync(taken.fileno())
            flush += time.perf_counter() - start
    return Copied(read, write, flush)


def sizes_of(export: Path, checkpoint: Path, teacher: Path) -> Sizes:
    shards = [path.stat().st_size for path in export.glob("*.safetensors")]
    return Sizes(
        exported=total_bytes(export.iterdir()),
        largest_shard=max(shards),
        num_shards=len(shards),
        checkpoint=total_bytes(checkpoint.iterdir()),
        teacher=total_bytes(path for path in teacher.rglob("*") if path.is_file()),
    )


def summary(rounds: list[Round], sizes: Sizes) -> list[str]:
    copies = [each.copy.seconds for pair in rounds for each in (pair.plain, pair.verified)]
    rows = [["median (min-max)", "seconds", "of the copy", "peak RSS, GB"]]
    rows.append(["copy: read, write, fsync", Spread.of(copies).text(3), "1", ""])
    contestants = {PLAIN: [each.plain for each in rounds], VERIFIED: [each.verified for each in rounds]}
    for name, exports in contestants.items():
        seconds, ratios = Spread.of([each.seconds for each in exports]), Spread.of([each.ratio for each in exports])
        memory = Spread.of([each.program.peak_rss / 1e9 for each in exports])
        rows.append([f"{name}, and fsync", seconds.text(2), ratios.text(2), memory.text(2)])
    rows.append(["target: at most", "", f"{TARGET_SECONDS:g}", f"{sizes.memory_bound / 1e9:.2f}"])
    without = Spread.of([each.ratio_without_start for each in rounds])
    rows.append([f"{PLAIN} without its start", "", without.text(2), ""])
    return [
        "",
        f"{sizes.exported / 1e9:.2f} GB exported, {sizes.num_shards} weight file{'s' * (sizes.num_shards > 1)} of at "
        f"most {sizes.largest_shard / 1e9:.2f} GB, from a checkpoint of {sizes.checkpoint / 1e9:.2f} GB and a teacher "
        f"of {sizes.teacher / 1e9:.2f} GB",
        *table(rows),
        "",
        *table(_parts(rounds)),
        "",
        f"The target of memory is {TARGET_SHARDS:g} of the largest weight file + {TARGET_BYTES / 1e9:g} GB.",
    ]


def _parts(rounds: list[Round]) -> list[list[str]]:
    """Where the time of an export goes."""
    parts = {
        "start of Python, imports": [each.start for each in rounds],
        "reading checkpoint and teacher, composing (the rest)": [each.rest for each in rounds],
        "writing, as long as the copy writes": [each.plain.copy.write for each in rounds],
        "fsync": [each.plain.flush for each in rounds],
        "verifying": [each.verifying for each in rounds],
    }
    rows = [["an export, median (min-max)", "seconds", "share"]]
    for name, values in parts.items():
        totals = [each.verifying + each.plain.seconds for each in rounds]
        shares = Spread.of([value / total for value, total in zip(values, totals, strict=True)])
        rows.append([name, Spread.of(values).text(3), shares.text(3)])
    return rows
