"""What a launcher left in the environment: too little, too much, or the way to a machine that is not there."""

import os
import socket
import time

import pytest

from megatron_lrc.commands.main import main
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.launch import environment
from megatron_lrc.launch.agreement import RanksMissing
from megatron_lrc.launch.environment import check_environment
from megatron_lrc.mcore import distributed

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"RANK": None}, "WORLD_SIZE is 2, but RANK, which of them this process is, is not set"),
        ({"MASTER_ADDR": None}, "RANK is 1, but MASTER_ADDR is not set"),
        ({"MASTER_PORT": "", "WORLD_SIZE": None}, "RANK is 1, but WORLD_SIZE and MASTER_PORT are not set"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2; ranks are from 0 to 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; a whole number of at least 1 is expected"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; a whole number of at least 1"),
        ({"RANK": "-1"}, "RANK is '-1'; a whole number of at least 0"),
        ({"LOCAL_RANK": "\u00b2"}, "LOCAL_RANK is"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999; a port is at most 65535"),
    ],
)
def test_variables_that_make_no_rank_of_a_run_are_refused_in_a_sentence(changes, message):
    given = {name: value for name, value in (WHOLE | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        check_environment(given, is_to_start=True)


ALONE = {"RANK": "0", "WORLD_SIZE": "1"}


@pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "1"}, ALONE, WHOLE])
def test_a_process_alone_and_one_of_a_launchers_may_start(given):
    check_environment(given, is_to_start=True)


def test_the_number_of_processes_alone_is_enough_to_calculate():
    check_environment({"WORLD_SIZE": "8"}, is_to_start=False)


@pytest.fixture
def launched(monkeypatch):
    """Sets the variables of a launcher, and no others."""

    def launch(**variables: str) -> None:
        for name in [name for name in os.environ if name in WHOLE or name.startswith("TORCHELASTIC_")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


def test_a_rank_without_others_needs_no_place_to_meet(launched):
    launched(**ALONE)
    assert (distributed.meet(Config()).rank, distributed.meet(Config()).world_size) == (0, 1)


def test_train_says_it_in_a_line(launched, capsys):
    launched(WORLD_SIZE="2")
    assert main(["train", "--teacher", "T"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: WORLD_SIZE is 2, but RANK")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "." * 300])
def test_a_master_whose_name_nobody_knows_is_named_soon(launched, monkeypatch, host):
    config = Config()
    monkeypatch.setattr(distributed, "RESOLVED_WITHIN", 0.1)
    launched(**WHOLE | {"MASTER_ADDR": host})
    with pytest.raises(RanksMissing, match="Rank 1 cannot find the store .*: this machine does not know the name"):
        distributed.meet(config)


def test_a_master_that_never_comes_ends_the_wait_and_is_named(launched):
    with socket.socket() as bound:  # so that nobody else listens there
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        launched(**WHOLE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        config = Config()
        config.parallel.distributed_timeout_minutes = 0.02
        since = time.monotonic()
        with pytest.raises(RanksMissing, match=rf"MASTER_ADDR 127\.0\.0\.1, MASTER_PORT {port} \(.*tim"):
            distributed.meet(config)
        assert time.monotonic() - since < 15


def test_a_name_that_becomes_known_is_waited_for(monkeypatch):
    answers = iter([OSError("not yet"), OSError("not yet"), []])

    def getaddrinfo(*_: object) -> list:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(environment.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(environment.time, "sleep", lambda _: None)
    assert environment.await_name("node0", within=60) is None
