"""Ranks that differ are named on every rank, through the store alone; and nobody waits for ever."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_lrc.config import ConfigError
from megatron_lrc.launch import agreement
from megatron_lrc.launch.agreement import Agreement, RanksMissing
from megatron_lrc.launch.differences import FIELDS, name_ranks

ALIKE = {"--lr": "0.0001", "--bf16": "False", "torch": "2.9"}
GONE = "gone"  # a rank that never comes


@pytest.fixture
def store() -> dist.HashStore:
    return dist.HashStore()


def agreement_of(store: dist.Store, rank: int, world_size: int, *, seconds: float = 20.0) -> Agreement:
    return Agreement(
        store=store,  # type: ignore[arg-type]
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
        name="test",
    )


def reach(store: dist.Store, ranks: list, *, seconds: float = 20.0, remarks: dict[int, str] | None = None) -> list:
    """What each rank gets or raises. ranks: of each its fields, GONE, or the error that keeps it from starting."""

    def run(rank: int) -> object:
        own = agreement_of(store, rank, len(ranks), seconds=seconds)
        try:
            if isinstance(ranks[rank], Exception):
                return own.tell_failure(str(ranks[rank]))
            return own.reach(ranks[rank], (remarks or {}).get(rank, ""))
        except (ConfigError, RanksMissing) as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as threads:
        futures = [threads.submit(run, rank) for rank in range(len(ranks)) if ranks[rank] != GONE]
        return [future.result(30) for future in futures]


def the_refusal(results: list) -> str:
    """Of ranks that all were told the same."""
    assert {type(result) for result in results} == {ConfigError}, results
    (text,) = {str(result) for result in results}
    return text


@pytest.fixture(autouse=True)
def hosts(monkeypatch):
    """The same name everywhere."""
    monkeypatch.setattr(agreement, "_here", lambda: {"host": "node"})


def test_ranks_that_are_alike_go_on(store):
    assert reach(store, [ALIKE] * 8) == [""] * 8


def test_the_order_in_which_fields_are_found_does_not_matter(store):
    assert reach(store, [ALIKE, dict(reversed(ALIKE.items()))]) == ["", ""]


def test_one_rank_that_differs_is_named_on_all(store):
    text = the_refusal(reach(store, [ALIKE, ALIKE, ALIKE, {**ALIKE, "--lr": "0.0002"}]))
    assert "--lr is 0.0002 on rank 3 (node) but 0.0001 on ranks 0-2 (node)." in text
    assert "--bf16" not in text and "torch" not in text


def test_rank_0_may_be_the_one_that_differs(store):
    text = the_refusal(reach(store, [{**ALIKE, "torch": "2.8"}, ALIKE, ALIKE]))
    assert "torch is 2.8 on rank 0 (node) but 2.9 on ranks 1-2 (node)." in text


def test_ranks_that_differ_alike_are_named_together(store):
    node = [{**ALIKE, "torch": "2.8"}] * 8
    text = the_refusal(reach(store, [*[ALIKE] * 8, *node, {**ALIKE, "--bf16": "True"}]))
    assert "torch is 2.8 on ranks 8-15 (node) but 2.9 on ranks 0-7, 16 (node)" in text
    assert "--bf16 is True on rank 16 (node) but False on ranks 0-15 (node)" in text


def test_what_only_some_ranks_have_is_a_difference(store):
    text = the_refusal(reach(store, [ALIKE, {**ALIKE, "NVTE_FLASH_ATTN": "0"}]))
    assert "NVTE_FLASH_ATTN is not there on rank 0 (node) but 0 on rank 1 (node)" in text


def test_a_message_stays_short_however_much_differs(store):
    many = [{f"field {number}": f"{rank} " * 100 for number in range(50)} for rank in range(20)]
    text = the_refusal(reach(store, many))
    assert f"and {50 - FIELDS} more differences" in text
    assert "and 5 more values on other ranks" in text and "ranks 8-19 differ too" in text
    assert len(text) < 3000


def test_fields_are_sent_only_where_ranks_differ_by_one_of_each_kind(store):
    reach(store, [ALIKE] * 6)
    assert not store.check(["agreement/test/fields/0"])
    other = dist.HashStore()
    reach(other, [*[ALIKE] * 3, *[{**ALIKE, "torch": "2.8"}] * 3])
    assert [other.check([f"agreement/test/fields/{rank}"]) for rank in range(6)] == [True, False, False] * 2


def test_a_rank_that_does_not_come_is_named_after_the_timeout(store):
    results = reach(store, [ALIKE, ALIKE, GONE, GONE], seconds=0.5)
    assert {type(result) for result in results} == {RanksMissing}
    (text,) = {str(result) for result in results}
    assert text.startswith(
        "Ranks 2-3 did not come within 0.00833 minutes of rank 0 (--distributed-timeout-minutes); 2 of"
    )


def test_ranks_that_differ_are_told_so_although_others_do_not_come(store):
    """As where one was started for more processes than the others."""
    text = the_refusal(reach(store, [{"WORLD_SIZE": "3"}, {"WORLD_SIZE": "2"}, GONE], seconds=0.5))
    assert "WORLD_SIZE is 3 on rank 0 (node) but 2 on rank 1 (node)" in text


def test_a_rank_that_rank_0_does_not_count_ends(store):
    """It was started for more processes."""
    with ThreadPoolExecutor(1) as threads:
        third = threads.submit(agreement_of(store, 2, 3).reach, {"WORLD_SIZE": "3"})
        assert reach(store, [{"WORLD_SIZE": "2"}] * 2) == ["", ""]
        with pytest.raises(ConfigError, match="Rank 2 of 3 processes is none of those that rank 0 counts"):
            third.result(30)


def test_rank_0_may_be_the_one_that_does_not_come(store):
    (result,) = reach(store, [GONE, ALIKE], seconds=0.5)
    assert isinstance(result, RanksMissing) and str(result).startswith("Rank 0 did not come within")


def test_a_rank_that_cannot_start_says_so_instead(store):
    failed, *others = reach(store, [ALIKE, ALIKE, ValueError("There is no text.idx.")][::-1], seconds=5.0)
    assert failed is None
    assert the_refusal(others) == "rank 0 (node) cannot start: There is no text.idx."
    other = dist.HashStore()
    *others, failed = reach(other, [ALIKE, ALIKE, ValueError("There is no text.idx.")], seconds=5.0)
    assert the_refusal(others) == "rank 2 (node) cannot start: There is no text.idx."


def test_a_rank_that_dies_before_it_says_what_it_is_differs_all_the_same(store, monkeypatch):
    monkeypatch.setattr(agreement, "SPEAK_WITHIN", timedelta(seconds=0.3))
    monkeypatch.setattr(agreement, "LEAVE_WITHIN", timedelta(seconds=0.1))
    dead = agreement_of(store, 2, 3)
    dead._write("rank/2", {"digest": "other", "remark": "", "host": "node"})
    text = the_refusal(reach(store, [ALIKE, ALIKE, GONE]))
    assert "rank 2 differs too" in text


def test_ranks_whose_store_is_gone_end():
    """As where torchrun dies that kept it: its connections end, which no timeout has to tell."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.extend(reach(client, [GONE, ALIKE], seconds=60.0)))
    thread.start()
    while not server.check(["agreement/test/rank/1"]):
        pass
    del server
    thread.join(20)
    assert len(results) == 1 and isinstance(results[0], RanksMissing) and "was gone before rank 1" in str(results[0])


def test_what_ranks_had_better_have_in_common_is_told_to_rank_0(store):
    remarks = {0: "H100", 1: "H100", 2: "A100"}
    assert reach(store, [ALIKE] * 3, remarks=remarks) == ["A100 on rank 2 (node) but H100 on ranks 0-1 (node)", "", ""]


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        ([3], "rank 3"),
        ([9, 0, 1, 2], "ranks 0-2, 9"),
        (range(0, 40, 2), "ranks 0, 2, 4, 6, 8, 10 and 14 more"),
    ],
)
def test_ranks_are_named_by_their_runs(ranks, name):
    assert name_ranks(ranks) == name
