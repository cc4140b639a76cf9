"""Checkpoints as files: which of them count, how damage is found, what retention keeps, what a death leaves behind."""

import json
import os
import threading
from pathlib import Path

import pytest

from megatron_lrc.checkpoints.run_directory import (
    STATE_FILE,
    FileSum,
    RunState,
    checkpoint_path,
    checkpoints,
    checkpoints_to_load,
    find_changed,
    find_missing,
    newest_checkpoint,
    partial_path,
    publish,
    read_state,
    remove_leftovers,
    remove_old,
)
from megatron_lrc.config import CheckpointConfig, Config, ModelShape

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=4,
    vocab_size=32,
    max_position_embeddings=64,
    norm_epsilon=1e-6,
    is_tied=False,
)


def write(run: Path, step: int, content: bytes = b"weights") -> Path:
    """A complete checkpoint of two files beside run.json."""
    final = checkpoint_path(run, step)
    partial = partial_path(final, "0a1b")
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(content)
    (partial / ".metadata").write_bytes(b"index")
    publish(partial, final, RunState(step=step), Config(), SHAPE, {})
    return final


def steps(run: Path) -> list[int]:
    return [read_state(path)[0].step for path in checkpoints(run)]


def test_only_complete_checkpoints_under_their_own_names_count(tmp_path):
    for step in (5, 100, 20):
        write(tmp_path, step)
    for name in (
        "iter_0000300.partial-0a1b",
        "iter_0000300.removed",
        "iter_0000300.replaced",
        "iter_30",
        "iter_0000400",
    ):
        (tmp_path / name).mkdir()
    for name in ("iter_0000300.partial-0a1b", "iter_0000300.removed", "iter_30"):
        (tmp_path / name / STATE_FILE).write_text("{}")
    assert steps(tmp_path) == [100, 20, 5]
    assert newest_checkpoint(tmp_path) == tmp_path / "iter_0000100"
    assert checkpoints(tmp_path / "absent") == [] and newest_checkpoint(tmp_path / "absent") is None


def test_load_names_a_run_or_one_checkpoint_or_with_auto_what_save_holds(tmp_path):
    first, second = write(tmp_path / "run", 1), write(tmp_path / "run", 2)
    run = str(tmp_path / "run")
    assert checkpoints_to_load(CheckpointConfig(load=run)) == [second, first]
    assert checkpoints_to_load(CheckpointConfig(load=str(first))) == [first]
    assert checkpoints_to_load(CheckpointConfig(load="auto", save=run)) == [second, first]
    assert checkpoints_to_load(CheckpointConfig(load="auto", save=str(tmp_path / "new"))) == []
    assert checkpoints_to_load(CheckpointConfig(save=run)) == []


def cut(path: Path) -> None:
    os.truncate(path / "__0_0.distcp", 3)


def lose(path: Path) -> None:
    (path / ".metadata").unlink()


def empty_the_record(path: Path) -> None:
    (path / STATE_FILE).write_text("")


def list_the_record(path: Path) -> None:
    (path / STATE_FILE).write_text("[]")


@pytest.mark.parametrize(
    "damage, words",
    [
        (cut, "__0_0.distcp has 3 bytes, not 7"),
        (lose, ".metadata is missing"),
        (empty_the_record, "run.json cannot be read"),
        (list_the_record, "run.json cannot be read"),
    ],
)
def test_what_is_missing_is_found_without_reading_the_files(tmp_path, damage, words):
    path = write(tmp_path, 1)
    assert find_missing(path) is None
    damage(path)
    assert words in (find_missing(path) or "")


@pytest.mark.parametrize("bit", range(0, 56, 11))
def test_each_flipped_bit_is_found_by_one_of_the_readers(tmp_path, bit):
    path = write(tmp_path, 1)
    assert find_changed(path) is None
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (path / "__0_0.distcp").write_bytes(content)
    assert find_missing(path) is None
    found = [find_changed(path, part=part, parts=3) for part in range(3)]
    assert [bool(words) for words in found].count(True) == 1
    assert "__0_0.distcp is not what was written" in "".join(words or "" for words in found)


def test_a_flipped_bit_of_the_record_is_found_or_changes_nothing_that_is_read(tmp_path):
    path = write(tmp_path, 1)
    whole, content = read_state(path), (path / STATE_FILE).read_bytes()
    num_found = 0
    for bit in range(0, 8 * len(content), 11):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / STATE_FILE).write_bytes(flipped)
        num_found += find_missing(path) is not None
        assert find_missing(path) or read_state(path) == whole, flipped[bit // 8 - 20 : bit // 8 + 20]
    assert num_found > 0.9 * 8 * len(content) / 11


def test_sums_made_while_writing_are_taken_over_and_so_find_what_changed_since(tmp_path):
    final = checkpoint_path(tmp_path, 1)
    partial = partial_path(final, "0a1b")
    partial.mkdir()
    (partial / "a").write_bytes(b"other")
    (tmp_path / "meant").write_bytes(b"meant")
    publish(partial, final, RunState(), Config(), SHAPE, {"a": FileSum.of(tmp_path / "meant")})
    assert find_missing(final) is None
    assert "a is not what was written" in (find_changed(final) or "")


def test_a_step_that_is_saved_again_takes_the_place_of_the_old_one(tmp_path):
    write(tmp_path, 7, b"old")
    path = write(tmp_path, 7, b"new")
    assert (path / "__0_0.distcp").read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "keep_last, retain_interval, newest, left",
    [
        (None, None, 50, [10, 20, 30, 40, 50]),
        (2, None, 50, [40, 50]),
        (9, None, 50, [10, 20, 30, 40, 50]),
        (1, 20, 50, [20, 40, 50]),
        (None, 20, 50, [20, 40, 50]),
        (2, 30, 50, [30, 40, 50]),
        (1, None, 30, [30, 40, 50]),  # 40 and 50 were passed over as damaged: not counted, not removed
    ],
)
def test_retention_keeps_the_last_ones_and_every_so_many(tmp_path, keep_last, retain_interval, newest, left):
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step)
    removed = remove_old(tmp_path, newest, keep_last=keep_last, retain_interval=retain_interval)
    assert sorted(steps(tmp_path)) == left
    assert len(removed) == 5 - len(left)
    for thread in threading.enumerate():
        if thread.name == "retention":
            thread.join()
    assert len(list(tmp_path.iterdir())) == len(left)


def test_what_a_death_left_behind_is_tidied_up_and_nothing_else(tmp_path):
    kept, again = write(tmp_path, 1), write(tmp_path, 2, b"again")
    os.replace(write(tmp_path, 3, b"the only one"), tmp_path / "iter_0000003.replaced")
    for name in ("iter_0000004.partial-ff00", "iter_0000001.removed", "iter_0000002.replaced", "iter_0000005.mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}")
    remove_leftovers(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {kept.name, again.name, "iter_0000003", "iter_0000005.mine", "metrics.jsonl"}
    assert (tmp_path / "iter_0000003" / "__0_0.distcp").read_bytes() == b"the only one"
    assert (again / "__0_0.distcp").read_bytes() == b"again"


def test_the_record_of_a_checkpoint_names_every_other_file(tmp_path):
    path = write(tmp_path, 1)
    recorded = json.loads((path / STATE_FILE).read_text())["files"]
    assert set(recorded) == {file.name for file in path.iterdir()} - {STATE_FILE}
