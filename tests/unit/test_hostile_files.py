"""Files of every format, damaged at random but alike each time: a sentence, no traceback, no growth, no hang."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("gguf")
PROGRAM = Path(__file__).parents[1] / "fuzz_process.py"
SECONDS, PATIENCE = 10.0, 240.0  # of the processor for one case; on the clock, where the machine is busy with others


def cpu_seconds(process: subprocess.Popen) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def follow(process: subprocess.Popen) -> list:
    """What failed: [format, number, what happened]. Ends a process that is too long at one case."""
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    stdout = process.stdout
    threading.Thread(target=lambda: [*map(lines.put, stdout), lines.put("")], daemon=True).start()
    failed, case, cpu, clock = [], None, 0.0, time.monotonic()
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            if case and (cpu_seconds(process) - cpu > SECONDS or time.monotonic() - clock > PATIENCE):
                process.kill()
                return [*failed, [*case, "is at it for too long"]]
            continue
        if not line:
            break
        case, cpu, clock = json.loads(line)[:2], cpu_seconds(process), time.monotonic()
        failed += [json.loads(line)] if len(json.loads(line)) == 3 else []
    return failed if process.wait() == 0 else [*failed, [case, f"ended with {process.returncode}"]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_damaged_files_of_every_format_are_a_sentence(tmp_path: Path) -> None:
    """Some 4,000 files; about 100 seconds of one core. `fuzz_process.py` says how to repeat one case."""
    errors = open(tmp_path / "stderr", "w")  # noqa: SIM115  (it ends with the test)
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(tmp_path / "files")], stdout=subprocess.PIPE, stderr=errors, text=True
    )
    try:
        failed = follow(process)
    finally:
        process.kill()
    said = "\n\n".join(f"{case[:2]}: {case[-1]}" for case in failed)
    assert not failed, said + (tmp_path / "stderr").read_text()[-2000:]
