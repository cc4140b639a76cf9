"""The naive LRC in a process of its own, as a program that was written first would run.

In our process it would compute with what we set there for ourselves: on CPU malloc keeps what is freed
(`mcore/cpu.py`). Its own has malloc's and torch's defaults and never imports megatron-core. It is started once,
computes with as many threads as we do, and between its steps waits in a blocking read, so it takes nothing from the
contestants that are measured meanwhile. Parent and child exchange pickles over a socket:

    to the child    Order, (name, projection) one by one, None, (name, norm gain) one by one, None; then True per step
    to the parent   None once the models are there; then (seconds, NaiveReport) per step; or an exception to raise
"""

import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import last_line, timed
from benchmarks.naive import NaiveClone, NaiveReport
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import TeacherDescription
from megatron_lrc.hf.reader import Reader

_PROGRAM = "from benchmarks.naive_process import main; main()"
_SECONDS_TO_END = 20


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to build. weights: None reads them from the teacher's directory, since open files cannot be sent.

    batch: the micro-batch of every step, on the CPU. num_threads: of torch's operations.
    """

    form: type[NaiveClone]
    config: Config
    teacher: TeacherDescription
    weights: Reader | None
    dtype: torch.dtype
    device: torch.device
    batch: Mapping[str, Tensor]
    num_microbatches: int
    num_threads: int


class NaiveProcess:
    """The parent's end. ConfigError in one sentence where the process fails, torch.OutOfMemoryError as it comes."""

    def __init__(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, see close
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
        )
        theirs.close()

    def __enter__(self) -> "NaiveProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def build(self, order: Order, *, projections: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        """Returns when teacher, student and optimizer are there. Each tensor goes by itself: there may be gigabytes."""
        with self._explaining_its_end():
            _send(self._connection, order)
            for tensors in (projections, norms):
                for name, tensor in tensors.items():
                    _send(self._connection, (name, tensor.detach().cpu()))
                _send(self._connection, None)
        self._receive()

    def step(self) -> tuple[float, NaiveReport]:
        """One optimizer step: its seconds, measured over there, and its report on the CPU."""
        with self._explaining_its_end():
            _send(self._connection, True)
        return self._receive()

    def close(self) -> None:
        """The process ends when nobody can ask it any more."""
        self._connection.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _receive(self) -> Any:
        with self._explaining_its_end():
            answer = _receive(self._connection)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @contextlib.contextmanager
    def _explaining_its_end(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_SECONDS_TO_END)
            reason = last_line(self._errors)
            if self._process.returncode == -9:
                reason = "killed, which the system does when memory runs out"
            raise ConfigError(
                f"The process of naive LRC ended with exit code {self._process.returncode}: {reason}. "
                "--contestants lrc,ordinary measures without it."
            ) from error


def main() -> None:
    """The child: argv[1] is its end of the socket."""
    serve(Connection(int(sys.argv[1])))


def serve(connection: Connection) -> None:
    """Build what is ordered, take a step whenever asked, end when the parent closes its end."""
    with contextlib.suppress(EOFError, ConnectionError):
        order = _receive(connection)
        answers = _answers(order, dict(_named(connection)), dict(_named(connection)))
        while True:
            _answer(connection, lambda: next(answers))
            _receive(connection)


def _answers(
    order: Order, projections: Mapping[str, Tensor], norms: Mapping[str, Tensor]
) -> Iterator[tuple[float, NaiveReport] | None]:
    """None when everything is built, then what each step gives."""
    torch.set_num_threads(order.num_threads)
    if order.device.type == "cuda":
        torch.cuda.set_device(order.device)
    naive = order.form(
        order.config,
        order.teacher,
        order.weights or open_teacher(order.teacher),
        projections=projections,
        norms=norms,
        dtype=order.dtype,
        device=order.device,
    )
    del projections, norms  # they have been copied
    batches = repeat({name: tensor.to(order.device) for name, tensor in order.batch.items()})
    yield None
    while True:
        seconds, report = timed(lambda: naive.step(batches, order.num_microbatches), order.device)
        yield seconds, report.cpu()


def _answer(connection: Connection, work: Callable[[], object]) -> None:
    try:
        answer = work()
    except (ConfigError, torch.OutOfMemoryError) as error:
        answer = error
    except Exception as error:  # whatever it is, the user gets a sentence
        answer = ConfigError(f"naive LRC failed: {type(error).__name__}: {' '.join(str(error).split())}")
    _send(connection, answer)


def _named(connection: Connection) -> Iterator[tuple[str, Tensor]]:
    while (item := _receive(connection)) is not None:
        yield item


def _send(connection: Connection, value: object) -> None:
    """As torch saves it: `send` would put tensors into shared memory, and megatron-core 0.19 has pickles of tensors
    name a function of its own, so that whoever reads one imports it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    connection.send_bytes(buffer.getbuffer())


def _receive(connection: Connection) -> Any:
    return torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False)  # it comes from ourselves
