"""Training processes to kill: those that the launch script starts, or as it does but fast.

`World` forks each rank from a server that has imported everything: a process in a session of its own that runs
`python -m megatron_lrc train FLAGS`'s main function in torchrun's environment. `LaunchedWorld` is the real thing.
"""

import contextlib
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch.distributed as dist

from ranks import PRELOAD

SCRIPT = Path(__file__).resolve().parents[1] / "examples/pretrain_lrc.sh"
#: What this process's launcher, or a cluster, may have set.
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "NNODES", "CUDA_VISIBLE_", "SLURM_", "TORCHELASTIC_")


def training_flags(teacher: str, data: str, run: Path, *more: str) -> list[str]:
    """Of a run of tiny steps, without end, without validation."""
    flags = f"--teacher {teacher} --student-hidden-size 24 --data-path {data} --split 90,10,0 --save {run} "
    flags += "--seq-length 16 --micro-batch-size 2 --global-batch-size 8 --train-iters 100000 --log-interval 1 "
    return [*flags.split(), "--eval-iters", "0", *more]


class World:
    """Ranks, each a process. stdout and stderr go to FOLDER/rank{R}.log. A context: at its end nothing is left."""

    def __init__(
        self,
        num_ranks: int,
        flags: list[str],
        folder: Path,
        before: Callable[[int], object] | None = None,
        own_flags: Mapping[int, list[str]] = MappingProxyType({}),
    ):
        """before: called with the rank in each process before it starts; importable. own_flags: rank -> more flags."""
        folder.mkdir(parents=True, exist_ok=True)
        self.num_ranks, self.code_when_stopped = num_ranks, 0
        self._logs = [folder / f"rank{rank}.log" for rank in range(num_ranks)]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, "megatron_lrc.commands.train"])
        # As torchrun has one: a free port that is free no more.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self.processes = [
            context.Process(
                target=_run,
                args=(rank, num_ranks, self._store.port, [*flags, *own_flags.get(rank, [])], str(log), before),
            )
            for rank, log in enumerate(self._logs)
        ]
        for process in self.processes:
            process.start()
        self.pids: list[int] = [process.pid or 0 for process in self.processes]

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        running = [process.pid or 0 for process in self.processes if process.is_alive()]  # some without a session yet
        for pid in {*running, *self.living()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def signal(self, rank: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def terminate(self, generator: random.Random) -> None:
        self.signal(generator.randrange(self.num_ranks), signal.SIGTERM)

    @property
    def is_running(self) -> bool:
        """Whether all ranks are."""
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes by rank; None for what is still running after these seconds."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0))
        return [process.exitcode for process in self.processes]

    def said(self, rank: int) -> str:
        return self._logs[rank].read_text() if self._logs[rank].exists() else ""

    def living(self) -> list[int]:
        """Ranks and whatever they have started (their sessions), as far as it lives."""
        return [pid for pid, session, state in _all_processes() if session in self.pids and state != "Z"]


class LaunchedWorld:
    """The script with torchrun and its processes on this machine. stdout and stderr go to FOLDER/output."""

    def __init__(self, num_ranks: int, flags: list[str], folder: Path, **environment: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.num_ranks, self.code_when_stopped = num_ranks, 1  # torchrun's, whatever its processes' are
        self._log = folder / "output"
        full = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCH_VARIABLES)}
        full |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GPUS_PER_NODE": str(num_ranks), **environment}
        with open(self._log, "w") as file:
            command = ["bash", str(SCRIPT), *flags]
            self.launcher = subprocess.Popen(command, env=full, stdout=file, stderr=file, start_new_session=True)
        self._sessions = {self.launcher.pid}

    def __enter__(self) -> "LaunchedWorld":
        return self

    def __exit__(self, *_: object) -> None:
        self.ranks()
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()

    def ranks(self) -> dict[int, int]:
        """Rank -> pid of the processes that torchrun, which the script becomes, has started."""
        found = {}
        with contextlib.suppress(OSError):
            for pid in Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text().split():
                environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
                if rank := re.search(r"\0RANK=(\d+)\0", environment):
                    found[int(rank[1])] = int(pid)
        self._sessions |= set(found.values())
        return found

    def signal(self, rank: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, KeyError):  # it may have ended
            os.kill(self.ranks()[rank], number)

    def terminate(self, _: random.Random) -> None:
        self.launcher.terminate()

    @property
    def is_running(self) -> bool:
        """Whether torchrun is."""
        return self.launcher.poll() is None

    def wait(self, seconds: float) -> list[int | None]:
        """torchrun's exit code; None if it is still running after these seconds."""
        self.ranks()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.launcher.wait(seconds)
        return [self.launcher.returncode]

    def said(self, _: int = 0) -> str:
        return self._log.read_text()

    def living(self) -> list[int]:
        """torchrun, its processes, and what they have started, as far as it lives."""
        return [pid for pid, session, state in _all_processes() if session in self._sessions and state != "Z"]


def _all_processes() -> list[tuple[int, int, str]]:
    """(pid, session, state) of every process."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, session = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:4]
                found.append((int(entry), int(session), state))
    return found


def _run(rank: int, size: int, port: int, flags: list[str], log: str, before: Callable[[int], object] | None) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    import torch

    torch.set_num_threads(1)
    if before:
        before(rank)
    from megatron_lrc.commands.main import main

    sys.exit(main(["train", *flags]))
