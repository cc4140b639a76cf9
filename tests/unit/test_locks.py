"""Two processes at one place: the second is told who is at work there, and one whose owner is dead is free at once."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from command_line import ROOT
from megatron_lrc import locks
from megatron_lrc.config import ConfigError
from megatron_lrc.locks import FileLock, Owner

HOLDER = """
import sys, time
from megatron_lrc.locks import FileLock
with FileLock(sys.argv[1], place="--save run", remedy="Wait."):
    print("held", flush=True)
    time.sleep(60)
"""


def lock_at(path: Path) -> FileLock:
    return FileLock(path, place="--save run", remedy="Wait until it has ended.")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".lock"


@pytest.fixture
def holder(path):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def without_flock(monkeypatch) -> None:
    """As a file system that has none answers."""
    monkeypatch.setattr(locks, "_try_flock", lambda file: (False, False))


def test_the_second_is_told_who_is_at_work_until_that_is_killed(path, holder):
    with pytest.raises(ConfigError) as refusal:
        lock_at(path).take()
    text = str(refusal.value)
    assert text.startswith(f"--save run is being written by another process (process {holder.pid} on ")
    assert text.endswith(". Wait until it has ended.") and "since 20" in text
    holder.kill()
    holder.wait()
    assert path.exists()
    with lock_at(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_without_flock_the_owner_is_looked_for(path, holder, monkeypatch):
    without_flock(monkeypatch)
    with pytest.raises(ConfigError, match=f"process {holder.pid} on .* Wait until it has ended.$"):
        lock_at(path).take()
    holder.kill()
    holder.wait()
    with lock_at(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_another_process_of_the_same_number_is_not_the_owner(path, monkeypatch):
    without_flock(monkeypatch)
    path.parent.mkdir()
    path.write_text(json.dumps(asdict(replace(Owner(), pid=os.getppid(), started=1.0))))
    with lock_at(path):
        pass


def write_owner_elsewhere(path: Path, *, age: float) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(replace(Owner(), host="node7", machine="another", pid=4))))
    os.utime(path, (time.time() - age, time.time() - age))


def test_an_owner_on_another_machine_that_is_silent_is_waited_for_and_then_dead(path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "SILENCE", 1.5)
    write_owner_elsewhere(path, age=100)
    with lock_at(path):
        assert "waits" not in capsys.readouterr().out
    write_owner_elsewhere(path, age=0)
    with lock_at(path):
        assert "waits up to 2 s for a sign of life of its last writer (process 4 on node7" in capsys.readouterr().out


def test_an_owner_on_another_machine_that_touches_the_file_is_alive(path, monkeypatch):
    write_owner_elsewhere(path, age=5)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: os.utime(path))
    with pytest.raises(ConfigError, match=rf"process 4 on node7.*if it is dead, remove {path}"):
        lock_at(path).take()


def test_the_owner_touches_the_file(path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with lock_at(path):
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def say_and_sleep(sender) -> None:
    """Its number is the sign that it has begun, and so has closed what a forked child closes at once."""
    sender.send(os.getpid())
    time.sleep(60)


def hold_and_fork(path: str, sender) -> None:
    """Take the lock, leave a forked child behind, and be killed."""
    lock_at(Path(path)).take()
    multiprocessing.get_context("fork").Process(target=say_and_sleep, args=(sender,)).start()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_forked_child_does_not_keep_the_lock_of_a_parent_that_was_killed(path):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=hold_and_fork, args=(str(path), sender))
    process.start()
    child = receiver.recv()
    try:
        process.join()
        with lock_at(path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_damaged_contents_are_nobodys(path):
    path.parent.mkdir()
    for text in ("", "{", "[" * 4000, "[1]", '{"pid": 1}'):
        path.write_text(text)
        with lock_at(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with lock_at(tmp_path / "file" / ".lock"):
        pass
    assert capsys.readouterr().out.startswith(f"warning: {tmp_path}/file/.lock cannot be written (")
