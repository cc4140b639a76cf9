"""Loading of real runs' checkpoints: past damage, exactly, onto other layouts, and never as code to run."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from checkpoints import write_run
from megatron_lrc.checkpoints.index import INDEX_FILE, UnsafeCheckpoint, read_index, refuse_code
from megatron_lrc.checkpoints.run_directory import (
    STATE_FILE,
    checkpoint_path,
    find_changed,
    find_missing,
    publish,
    read_state,
)
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.mcore import compat
from megatron_lrc.mcore.checkpoint import damage_on_any_rank
from megatron_lrc.train import loop
from megatron_lrc.train.start_checks import check
from megatron_lrc.train.step import Run, train_step
from ranks import run_ranks
from runs import (
    assert_same_parameters,
    continued,
    make_config,
    make_trainer,
    on_layout,
    records,
    saving,
    train,
    without_times,
)
from students import random_student

pytestmark = pytest.mark.distributed


# ------------------------------------------------------------------------------------------------ which one is loaded


def flip_a_bit(path: Path) -> None:
    largest = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)


def truncate(path: Path) -> None:
    file = sorted(path.glob("*.distcp"))[-1]
    os.truncate(file, file.stat().st_size // 2)


def delete_the_index(path: Path) -> None:
    (path / INDEX_FILE).unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, delete_the_index])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tiny_llama, tiny_text, tmp_path, damage):
    config = on_layout(make_config(tiny_llama(), tiny_text, tmp_path / "whole", steps=6), pp=2)
    train(config, 2)
    run = saving(config, save=str(tmp_path / "run"), load="auto", save_interval=2)
    train(replace(run, training=replace(config.training, train_iters=4)), 2)
    damage(checkpoint_path(tmp_path / "run", 4))
    lines = run_ranks(2, train_and_listen, run.resolved(2))[0]
    warnings = [line for line in lines if "passed over" in line]
    assert len(warnings) == 1 and "iter_0000004 is damaged" in warnings[0]
    assert any("iter_0000002 at step 2" in line for line in lines)
    assert without_times(records(tmp_path / "run")) == without_times(records(tmp_path / "whole"))
    assert_same_parameters(tmp_path / "run", tmp_path / "whole")
    again = checkpoint_path(tmp_path / "run", 4)  # the run came by that step once more
    assert find_missing(again) is None and find_changed(again) is None


@pytest.mark.parametrize("owner", ["0", "1"])
def test_a_copy_of_a_checkpoint_that_only_one_rank_has_is_looked_at_whole(tiny_llama, tmp_path, owner):
    teacher = describe_teacher(tiny_llama())
    original = write_run(tmp_path / "0", teacher, *random_student(teacher, 24, has_lm_head=True))
    shutil.copytree(original, tmp_path / "1" / original.name)
    flip_a_bit(tmp_path / owner / original.name)
    damages = run_ranks(2, look_for_damage, tmp_path, original.name)
    assert "is not what was written" in str(damages[0]) and damages[0] == damages[1]


def look_for_damage(parent: Path, name: str) -> str | None:
    return damage_on_any_rank(parent / os.environ["RANK"] / name)


def train_and_listen(config: Config) -> list[str]:
    lines: list[str] = []
    loop.Trainer._say = lambda self, line: lines.append(line)  # type: ignore[method-assign]
    loop.train(config)
    return lines


def test_where_every_checkpoint_is_damaged_the_run_does_not_start_anew_by_itself(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=2)
    run = saving(config, load="auto", save_interval=1)
    train(run)
    for step in (1, 2):
        flip_a_bit(checkpoint_path(tmp_path / "run", step))
    with pytest.raises(AssertionError, match="every checkpoint is damaged .*iter_0000002: .*; iter_0000001: "):
        train(run)


def test_auto_starts_a_run_and_goes_on_with_it(tiny_llama, tiny_text, tmp_path):
    config = saving(make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=2), load="auto")
    train(config)
    train(replace(config, training=replace(config.training, train_iters=3)))
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2, 3]


def test_an_older_checkpoint_is_continued_only_where_no_newer_one_is_written_over(tiny_llama, tiny_text, tmp_path):
    config = saving(make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=3), save_interval=1)
    train(config)
    older = str(checkpoint_path(tmp_path / "run", 2))
    with pytest.raises(ConfigError, match="holds iter_0000003, which is newer than"):
        check(saving(config, load=older), 1)
    train(saving(config, load=older, save=str(tmp_path / "elsewhere")))
    assert_same_parameters(tmp_path / "elsewhere", tmp_path / "run")


@pytest.mark.parametrize("bf16, dist_opt", [(False, False), (True, False), (True, True)])
def test_a_new_run_may_start_from_the_weights_of_another(tiny_llama, tiny_text, tmp_path, bf16, dist_opt):
    config = on_layout(make_config(tiny_llama(), tiny_text, tmp_path / "first", steps=3), dist_opt=dist_opt)
    config.training.bf16 = bf16
    train(config)
    new = saving(config, save=str(tmp_path / "new"), load="auto", pretrained_checkpoint=str(tmp_path / "first"))
    train(replace(new, training=replace(config.training, train_iters=0)))
    assert_same_parameters(tmp_path / "new", tmp_path / "first")
    assert read_state(checkpoint_path(tmp_path / "new", 0))[0].consumed_samples == 0
    first_end, new_start = (records(tmp_path / run, "validation.jsonl")[-1] for run in ("first", "new"))
    assert new_start["loss"] == first_end["loss"]

    def train_both() -> None:
        train(replace(new, training=replace(config.training, train_iters=2)))  # auto: now it goes on with itself
        fresh = saving(new, save=str(tmp_path / "fresh"))
        train(replace(fresh, training=replace(config.training, train_iters=2)))

    train_both()
    assert_same_parameters(tmp_path / "new", tmp_path / "fresh")
    assert [line["lr"] for line in records(tmp_path / "new")] == [line["lr"] for line in records(tmp_path / "fresh")]


# ------------------------------------------------------------------------------------------------ exactness


def in_small_buckets(config: Config) -> Config:
    """Some 20 buckets, padded at their ends: 48 x 20 is no multiple of 128."""
    config = on_layout(config, dist_opt=True)
    config.model.student_hidden_size = 20
    return replace(config, parallel=replace(config.parallel, overlap_grad_reduce=True, ddp_bucket_size=2000))


@pytest.mark.parametrize(
    "stops, bf16",
    [
        pytest.param((0, 1, 4), True, id="before-the-first-step-bf16", marks=pytest.mark.slow),
        pytest.param((3, 7, 8), False, id="across-an-epoch-fp32"),
        pytest.param((0, 1, 4), False, id="before-the-first-step-fp32", marks=pytest.mark.slow),
        pytest.param((3, 7, 8), True, id="across-an-epoch-bf16", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_stops_again_and_again_is_the_run_that_never_stopped(tiny_llama, tiny_text, tmp_path, stops, bf16):
    config = in_small_buckets(make_config(tiny_llama(is_tied=True), tiny_text, tmp_path / "whole", steps=9))
    config.training.bf16 = bf16
    config.training.seq_length = 64  # so that an epoch ends on the way
    config.loss.clone_normalization, config.projection.calibration_tokens = "token", 64
    train(config, 2)
    run = saving(config, save=str(tmp_path / "run"), load="auto", async_save=True, save_interval=2)
    for stop in stops:
        train(replace(run, training=replace(config.training, train_iters=stop)), 2)
    train(run, 2)
    assert without_times(records(tmp_path / "run")) == without_times(records(tmp_path / "whole"))
    assert_same_parameters(tmp_path / "run", tmp_path / "whole")


def train_as_megatron_core_saves(config: Config) -> None:
    with patch.object(compat, "find_saved_state_in_every_bucket"):
        loop.train(config)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_optimizer_state_that_is_not_of_the_weights_is_refused(tiny_llama, tiny_text, tmp_path, bf16):
    """As megatron-core writes it for padded buckets when it is left to itself."""
    config = in_small_buckets(make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=2))
    config.training.bf16 = bf16
    run_ranks(1, train_as_megatron_core_saves, config.resolved(1))
    with pytest.raises(AssertionError, match="ConfigError.* does not belong to its weights.* --pretrained-checkpoint"):
        train(replace(saving(config, load="auto"), training=replace(config.training, train_iters=3)))


@pytest.mark.parametrize(
    "bf16", [pytest.param(False, id="fp32", marks=pytest.mark.slow), pytest.param(True, id="bf16")]
)
@pytest.mark.parametrize("dist_opt", [False, True], ids=["from-replicated", "from-distributed"])
def test_a_run_may_go_on_with_the_other_kind_of_optimizer(tiny_llama, tiny_text, tmp_path, dist_opt, bf16):
    config = on_layout(make_config(tiny_llama(), tiny_text, tmp_path / "whole", steps=4), dist_opt=dist_opt)
    config.training.bf16 = bf16
    train(config, 2)
    changed = saving(config, save=str(tmp_path / "changed"), load="auto")
    train(replace(changed, training=replace(config.training, train_iters=2)), 2)
    train(on_layout(changed, dist_opt=not dist_opt), 2)
    for line, reference in zip(records(tmp_path / "changed"), records(tmp_path / "whole"), strict=True):
        for key in ("loss", "lm_loss", "kl_loss", "clone_loss"):
            assert line[key] == pytest.approx(reference[key], rel=2e-3 if bf16 else 1e-5), (line["step"], key)


LAYOUTS = {"one": {}, "PP2": {"pp": 2}, "DP2": {"dist_opt": True}}


def test_a_checkpoint_goes_from_tp2_pp2_to_every_other_layout_and_back(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(is_tied=True), tiny_text, tmp_path / "whole", steps=4)
    config.loss.clone_normalization, config.projection.calibration_tokens = "token", 64
    four = on_layout(config, tp=2, pp=2)
    train(four, 4)
    origin = saving(four, save=str(tmp_path / "origin"))
    train(replace(origin, training=replace(config.training, train_iters=2)), 4)
    for name, layout in LAYOUTS.items():
        there = saving(on_layout(config, **layout), save=str(tmp_path / name), load=str(tmp_path / "origin"))
        train(replace(there, training=replace(config.training, train_iters=3)), 1 if name == "one" else 2)
        back = saving(four, save=str(tmp_path / f"{name}-and-back"), load=str(tmp_path / name))
        train(back, 4)
        lines = [*records(tmp_path / name), *records(tmp_path / f"{name}-and-back")]
        for line, reference in zip(lines, records(tmp_path / "whole")[2:], strict=True):
            for key in ("loss", "lm_loss", "kl_loss", "clone_loss"):
                assert line[key] == pytest.approx(reference[key], rel=1e-5), (name, line["step"], key)


def test_a_step_draws_no_random_numbers_so_a_checkpoint_needs_no_random_state(tiny_llama, tiny_text, tmp_path):
    assert run_ranks(1, step_and_compare_random_state, make_config(tiny_llama(), tiny_text, tmp_path, steps=2)) == [
        True
    ]


def step_and_compare_random_state(config: Config) -> bool:
    trainer = make_trainer(config.resolved(1))
    run: Run = trainer.run
    batches = trainer._batches(trainer.train_data, 0)
    train_step(run, batches)
    before = torch.get_rng_state()
    train_step(run, batches)
    return torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------ no code


class Bomb:
    """Pickled, it creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (self.path,)


def put_in_the_index(path: Path, bomb: Bomb) -> None:
    index = read_index(path)
    index.planner_data = bomb
    (path / INDEX_FILE).write_bytes(pickle.dumps(index))


def put_in_the_common_file(path: Path, bomb: Bomb) -> None:
    torch.save({"num_updates": 3, "more": bomb}, path / "common.pt")


def put_in_an_object(path: Path, bomb: Bomb) -> None:
    """Behind the tensors of a file, with the index saying that an object lies there."""
    index = read_index(path)
    content = io.BytesIO()
    torch.save([bomb], content)
    place = next(iter(index.storage_data))
    stored = index.storage_data[place]
    file = path / stored.relative_path
    new = replace(stored, offset=file.stat().st_size, length=len(content.getvalue()))
    with open(file, "ab") as end:
        end.write(content.getvalue())
    index.state_dict_metadata["extra"] = BytesStorageMetadata()
    index.storage_data[replace(place, fqn="extra", offset=None, index=None)] = new
    (path / INDEX_FILE).write_bytes(pickle.dumps(index))


def put_in_another_folder(path: Path, bomb: Bomb) -> None:
    """An object by the name of a harmless file of the checkpoint, in another folder, which the index names. The run
    asks for a tensor by the name of this object."""
    index = read_index(path)
    place = next(place for place in index.storage_data if place.fqn.startswith("projections."))
    elsewhere = path.parents[1] / "elsewhere"
    elsewhere.mkdir()
    for folder, content in ((path, [None]), (elsewhere, [bomb])):
        torch.save(content, folder / "objects", _use_new_zipfile_serialization=False)  # bytes behind it do no harm
        os.truncate(folder / "objects", 4096)
    index.state_dict_metadata[place.fqn] = BytesStorageMetadata()
    index.storage_data = {key: stored for key, stored in index.storage_data.items() if key.fqn != place.fqn}
    index.storage_data[MetadataIndex(place.fqn)] = _StorageInfo("../../elsewhere/objects", 0, 4096)
    (path / INDEX_FILE).write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("put", [put_in_the_index, put_in_the_common_file, put_in_an_object, put_in_another_folder])
def test_a_checkpoint_that_would_run_code_is_refused_before_it_can(tiny_llama, tiny_text, tmp_path, put):
    """Sizes and checksums do not help against someone who writes a checkpoint: here they fit."""
    config = make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=1)
    train(config)
    path, traces = checkpoint_path(tmp_path / "run", 1), tmp_path / "it-ran"
    refuse_code(path)
    put(path, Bomb(traces))
    state, saved, shape = read_state(path)
    (path / STATE_FILE).unlink()
    os.replace(path, other := path.with_name("iter_0000001.partial-00"))
    publish(other, path, state, saved, shape, {})
    with pytest.raises(UnsafeCheckpoint):
        refuse_code(path)
    with pytest.raises(AssertionError, match="so it is not loaded"):
        train(continued(config, steps=2))
    with pytest.raises(AssertionError, match="so it is not loaded"):
        train(saving(config, save=str(tmp_path / "new"), pretrained_checkpoint=str(path)))
    assert not traces.exists()
