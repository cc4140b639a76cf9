"""`benchmark.py start`: what it costs that all ranks compare what they are, before they start (`launch/agreement.py`).

Every rank is simulated by a thread with a connection of its own to one store of torch's, all in this process: the
store, its protocol and the comparison are the real ones, the network is the loopback. All begin at the same moment,
which is the worst for the store. The time ends when the last rank knows what comes of it, and has in it that the
threads of all ranks share one interpreter: N machines would have N. Connecting is not counted: a start does it anyway.
"""

import argparse
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from benchmarks.measure import Spread, table
from megatron_lrc.config import ConfigError
from megatron_lrc.launch.agreement import Agreement

Fields = Mapping[str, str]
ALIKE: Fields = {f"field {number}": f"{number:016x}" for number in range(350)}  # about as many as a rank has
_CONNECTING = 256  # threads

#: What is measured -> what a rank is, by its number.
CASES: dict[str, Callable[[int], Fields]] = {
    "all alike": lambda rank: ALIKE,
    "one rank differs": lambda rank: ALIKE if rank != 7 else {**ALIKE, "field 3": "other"},
    "every rank differs": lambda rank: {**ALIKE, "field 3": str(rank)},
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=1024, metavar="N", help="simulated (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of each case (default: %(default)s)")


def run(arguments: argparse.Namespace, report: Callable[[str], None]) -> int:
    """1 if ranks were not told what they should be."""
    rows, is_right = [], True
    with Simulation(arguments.ranks) as simulation:
        for name, fields_of in CASES.items():
            rounds = [simulation.compare(fields_of) for _ in range(arguments.repeats)]
            is_right &= all(one[2] == (0 if name == "all alike" else arguments.ranks) for one in rounds)
            seconds, processor = (Spread.of([one[part] for one in rounds]).text(2) for part in (0, 1))
            rows.append([name, seconds, processor])
    for line in table([[f"{arguments.ranks} ranks", "seconds", "processor seconds"], *rows]):
        report(line)
    return 0 if is_right else 1


class Simulation:
    """A store and so many connections to it. A context: they close at its end."""

    def __init__(self, ranks: int):
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self._comparisons = 0
        with ThreadPoolExecutor(_CONNECTING) as threads:
            self._clients = list(threads.map(self._connect, range(ranks)))

    def __enter__(self) -> "Simulation":
        return self

    def __exit__(self, *_: object) -> None:
        self._clients.clear()
        del self._store

    def _connect(self, _: int) -> Store:
        port = self._store.port
        return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]

    def compare(self, fields_of: Callable[[int], Fields]) -> tuple[float, float, int]:
        """Seconds until the last rank knows; processor seconds of the store and all ranks; how many were refused."""
        self._comparisons += 1
        refused: list[int] = []
        start = threading.Barrier(len(self._clients) + 1)

        def compare(rank: int, client: Store) -> None:
            fields = fields_of(rank)
            agreement = Agreement(
                store=client,  # type: ignore[arg-type]
                rank=rank,
                world_size=len(self._clients),
                timeout=timedelta(minutes=1),
                name=str(self._comparisons),
            )
            start.wait()
            try:
                agreement.reach(fields)
            except ConfigError:
                refused.append(rank)

        threads = [threading.Thread(target=compare, args=place) for place in enumerate(self._clients)]
        for thread in threads:
            thread.start()
        start.wait()
        began, processor = time.perf_counter(), time.process_time()
        for thread in threads:
            thread.join()
        return time.perf_counter() - began, time.process_time() - processor, len(refused)
