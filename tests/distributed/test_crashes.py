"""A rank that dies, fails or hangs ends the whole run soon, and every rank's log says which one it was."""

import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from megatron_lrc.launch import connections, peers
from megatron_lrc.launch.connections import Connection, introduce
from megatron_lrc.launch.peer_hub import ANSWER_WITHIN, Hub, _Rank
from runs import steps_of
from waiting import wait_until
from worlds import World, training_flags

HOST = socket.gethostname()
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]


def is_under_way(world: World, run: Path) -> bool:
    assert world.is_running, [world.said(rank) for rank in range(len(world.pids))]
    return len(steps_of(run)) > 1


def last_line(world: World, rank: int) -> str:
    return (world.said(rank).splitlines() or [""])[-1]


def raise_in_step(rank: int, *, of_rank: int) -> None:
    """On one rank the third step fails."""
    from megatron_lrc.train import loop

    real, steps = loop.train_step, iter(range(100))

    def train_step(*args, **kwargs):
        if rank == of_rank and next(steps) == 2:
            raise ArithmeticError("spoiled")
        return real(*args, **kwargs)

    loop.train_step = train_step


def hang_in_step(rank: int, *, of_rank: int) -> None:
    """On one rank the third step never ends."""
    from megatron_lrc.train import loop

    real, steps = loop.train_step, iter(range(100))

    def train_step(*args, **kwargs):
        if rank == of_rank and next(steps) == 2:
            time.sleep(1000)
        return real(*args, **kwargs)

    loop.train_step = train_step


@pytest.mark.distributed
@pytest.mark.parametrize(
    "num_ranks, victim, flags",
    [
        pytest.param(2, 1, TP2, id="TP2"),
        pytest.param(2, 0, PP2, id="PP2-rank-0"),
        pytest.param(4, 2, [*TP2, *PP2], id="TP2-PP2"),
        # Its data loader lives on for 5 s, with its parent's gloo connections: gloo notices nothing.
        pytest.param(2, 1, ["--num-workers", "1"], id="DP2-with-data-loader"),
    ],
)
def test_a_killed_rank_ends_the_others_within_seconds_and_is_named(
    tiny_llama, tiny_text, tmp_path, num_ranks, victim, flags
):
    run = tmp_path / "run"
    with World(num_ranks, training_flags(tiny_llama(), tiny_text, run, *flags), tmp_path / "logs") as world:
        wait_until(lambda: is_under_way(world, run))
        world.signal(victim, signal.SIGKILL)
        exit_codes = world.wait(4.5 if "--num-workers" in flags else 10)
        assert exit_codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(num_ranks)]
        for rank in range(num_ranks):
            if rank != victim:
                expected = f"error: rank {victim} ({HOST}) died; with it ends rank {rank} ({HOST})"
                assert last_line(world, rank) == expected
                assert "Traceback" not in world.said(rank)
        wait_until(lambda: not world.living(), 10)


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks, victim, flags", [(2, 1, PP2), (4, 0, [*TP2, *PP2])], ids=["PP2", "TP2-PP2"])
def test_an_exception_in_one_rank_is_quoted_by_all_and_its_traceback_is_in_that_ranks_log(
    tiny_llama, tiny_text, tmp_path, num_ranks, victim, flags
):
    flags = training_flags(tiny_llama(), tiny_text, tmp_path / "run", *flags)
    with World(num_ranks, flags, tmp_path / "logs", partial(raise_in_step, of_rank=victim)) as world:
        assert world.wait(60) == [1] * num_ranks
        cause = f"rank {victim} ({HOST}) failed: ArithmeticError: spoiled"
        for rank in range(num_ranks):
            if rank == victim:
                assert "Traceback" in world.said(rank) and last_line(world, rank) == "ArithmeticError: spoiled"
            else:
                assert last_line(world, rank) == f"error: {cause}; with it ends rank {rank} ({HOST})"
        assert not world.living()


@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_when_the_others_have_waited_for_the_timeout(tiny_llama, tiny_text, tmp_path, victim):
    run = tmp_path / "run"
    flags = training_flags(tiny_llama(), tiny_text, run, *TP2, "--distributed-timeout-minutes", "0.05")
    with World(2, flags, tmp_path / "logs") as world:
        wait_until(lambda: is_under_way(world, run))
        world.signal(victim, signal.SIGSTOP)
        since = time.monotonic()
        wait_until(lambda: not world.processes[1 - victim].is_alive(), 20)
        assert 2 < time.monotonic() - since < 3 + ANSWER_WITHIN + 6
        expected = f"error: rank {victim} ({HOST}) does not answer; with it ends rank {1 - victim} ({HOST})"
        assert last_line(world, 1 - victim) == expected


@pytest.mark.distributed
def test_a_rank_that_hangs_in_our_code_is_found_by_where_it_is(tiny_llama, tiny_text, tmp_path):
    flags = training_flags(tiny_llama(), tiny_text, tmp_path / "run", *PP2, "--distributed-timeout-minutes", "0.05")
    with World(2, flags, tmp_path / "logs", partial(hang_in_step, of_rank=1)) as world:
        assert world.wait(60) == [1, 1]
        for rank in (0, 1):
            found = next(line for line in world.said(rank).splitlines() if line.startswith("error: "))
            assert found.startswith(f"error: rank 0 ({HOST}) failed: RuntimeError: ") and "all ranks answer; " in found
            assert f"rank 1 ({HOST}) in train/loop.py:" in found


def end_late(rank: int, *, of_rank: int) -> None:
    """One rank takes its time to end, when the others are through."""
    from megatron_lrc.mcore import distributed

    real = distributed.stop

    def stop() -> None:
        time.sleep(2 if rank == of_rank else 0)
        real()

    distributed.stop = stop


@pytest.mark.distributed
@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_is_through_is_no_failure(tiny_llama, tiny_text, tmp_path, late):
    flags = training_flags(tiny_llama(), tiny_text, tmp_path / "run", "--train-iters", "2")
    with World(2, flags, tmp_path / "logs", partial(end_late, of_rank=late)) as world:
        assert world.wait(60) == [0, 0]
        for rank in (0, 1):
            assert "error: " not in world.said(rank) and "Traceback" not in world.said(rank)


# ------------------------------------------------------------------------------------------------ rank 0's part


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Of a run of four, of whom one does not come."""
    hub = Hub(4, is_one_machine=True)
    hub.start()
    yield hub
    hello(hub, 0).send(bye=True)
    hub.join(10)
    assert not hub.is_alive()


def hello(hub: Hub, rank: int, host: str = "") -> Connection:
    """A rank's connection."""
    connection = introduce("127.0.0.1", hub.address["port"], hub.address["token"], within=10)
    connection.send(rank=rank, host=host or f"node{rank}")
    return connection


def stranger_of(hub: Hub, words: bytes = b"") -> socket.socket:
    end = socket.create_connection(("127.0.0.1", hub.address["port"]), timeout=10)
    with contextlib.suppress(OSError):  # cut off already
        end.sendall(words)
    return end


def is_cut_off(end: socket.socket) -> bool:
    """Within 10 s."""
    with end, contextlib.suppress(ConnectionResetError):
        return end.recv(1) == b""
    return True


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\nHost: node0.example\r\n\r\n",
        b'{"failed": "x", "is_waiting": false}\n',
        b"[" * 60_000 + b"\n",
        b"[" * 1_000_000,
        b"\xff" * 100,
        b"0" * connections.TOKEN_BYTES + b'\n{"bye": true}\n',
    ],
    ids=["http", "failure", "nested", "endless", "bytes", "guessed-token"],
)
def test_a_stranger_is_cut_off_unparsed_and_cannot_end_a_run(hub, words):
    rank = hello(hub, 1)
    assert is_cut_off(stranger_of(hub, words))
    rank.send(bye=True)
    assert rank.receive() is None  # closed: the thread is there, and has heard of no failure


def test_strangers_who_say_too_little_have_little_time(hub, monkeypatch):
    monkeypatch.setattr(connections, "STRANGER_FOR", 0.3)
    strangers = [stranger_of(hub), stranger_of(hub, b"[]\n"), stranger_of(hub, hub.address["token"][:-1].encode())]
    since = time.monotonic()
    assert all(map(is_cut_off, strangers)) and time.monotonic() - since < 5


def test_held_connections_take_few_files_and_keep_no_rank_out(hub):
    before = len(os.listdir("/proc/self/fd"))
    strangers = [stranger_of(hub) for _ in range(400)]
    ranks = [hello(hub, rank) for rank in (1, 2)]
    of_hub = len(os.listdir("/proc/self/fd")) - before - len(strangers) - len(ranks)
    assert of_hub <= connections.MOST_STRANGERS + 4 + len(ranks)
    for end in strangers:
        end.close()
    for rank in ranks:
        rank.send(bye=True)


def test_too_many_open_files_leave_the_hub_alive(hub):
    rank = hello(hub, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    stranger = socket.socket()  # before there are too many
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))
        stranger.connect(("127.0.0.1", hub.address["port"]))
        time.sleep(0.2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    stranger.sendall(b"x" * 100)
    assert is_cut_off(stranger)
    rank.send(bye=True)
    assert rank.receive() is None


def test_the_port_is_closed_when_all_ranks_have_come():
    hub = Hub(2, is_one_machine=True)
    hub.start()
    ranks = [hello(hub, rank) for rank in (0, 1)]
    with pytest.raises(ConnectionRefusedError):
        while True:
            # One that stands in the queue while the port is closed is reset; the next is refused.
            with contextlib.suppress(ConnectionResetError):
                stranger_of(hub).close()
    for rank in reversed(ranks):
        rank.send(bye=True)
    hub.join(10)
    assert not hub.is_alive()


@pytest.mark.parametrize("words", [b"[" * 60_000 + b"\n", b"[1]\n", b'{"failed": 3}\n', b"x" * 300_000])
def test_a_rank_that_talks_nonsense_has_died_and_the_hub_says_so(words):
    hub = Hub(2, is_one_machine=True)
    hub.start()
    rank_0, mad = hello(hub, 0), hello(hub, 1)
    wait_until(lambda: sorted(rank.number for rank in hub._ranks.values()) == [0, 1], 10)
    mad._end.sendall(words)
    assert rank_0.receive() == [{"ask": True}]
    rank_0.send(at="train/loop.py:1")
    assert rank_0.receive() == [{"verdict": "rank 1 (node1) died", "ranks": [1]}]


def test_a_host_that_goes_down_is_told_in_one_sentence_to_the_ranks_that_are_left():
    hub = Hub(12, is_one_machine=True)
    hub.start()
    left = hello(hub, 0)
    for connection in [hello(hub, rank, "node7") for rank in range(1, 12)]:
        connection.close()
    lines: list[dict] = []
    while len(lines) < 2:
        lines += left.receive() or []
    assert lines[0] == {"ask": True}
    verdict = lines[1]
    assert sorted(verdict["ranks"]) == list(range(1, 12))
    *named, rest = verdict["verdict"].split("; ")
    assert named == [f"rank {rank} (node7) died" for rank in verdict["ranks"][:8]] and rest == "and 3 more ranks"


def test_a_rank_takes_no_other_service_for_rank_0(monkeypatch):
    monkeypatch.setattr(peers, "CONNECT_WITHIN", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = {"host": HOST, "port": other.getsockname()[1], "token": "x"}
        with pytest.raises(OSError, match="no answer from rank 0 at 127.0.0.1 or"):
            peers.Peers(1, address)


class NotedConnection:
    """In place of a socket: notes who is told."""

    def __init__(self, told: list[int], number: int):
        self.told, self.number = told, number

    def send(self, **message: object) -> None:
        self.told.append(self.number)


def test_rank_0_is_told_last_since_it_may_end_at_once_and_the_telling_with_it():
    told: list[int] = []
    hub = Hub(3, is_one_machine=True)
    hub._ranks = {NotedConnection(told, number): _Rank(number) for number in (0, 2, 1)}  # type: ignore[dict-item]
    hub._tell(verdict="rank 2 died", ranks=(2,))
    hub._entrance.close()
    assert told == [2, 1, 0]
