"""A resumed run reads the samples that are next, once each, whatever has changed in batches, processes and steps."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from megatron_lrc.checkpoints.run_directory import STATE_FILE, newest_checkpoint, read_state
from megatron_lrc.config import Config, ConfigError, validate
from megatron_lrc.data.datasets import build_datasets
from megatron_lrc.data.index_cache import build_index_cache
from megatron_lrc.methods import method_of
from megatron_lrc.train import loop
from megatron_lrc.train.start_checks import check
from ranks import run_ranks
from runs import make_config, records
from tiny_data import write_dataset

Samples = list[list[int]]


def train_and_listen(config: Config) -> tuple[list[Samples], str]:
    """A whole run on this rank: the micro-batches of tokens that its training steps took, and what it printed."""
    seen: list[Samples] = []

    class Listening(loop.BatchIterator):
        def __next__(self):
            batch = super().__next__()
            seen.append(batch["tokens"].tolist())
            return batch

    loop.BatchIterator = Listening  # this process ends with the run
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        loop.train(config)
    return seen, printed.getvalue()


def run(config: Config, ranks: int = 1) -> tuple[Samples, list[str]]:
    """The samples that a run reads, in the order of the data, and its warnings about that data."""
    validate(method_of(config), world_size=ranks)
    seen, printed = zip(*run_ranks(ranks, train_and_listen, config.resolved(ranks)), strict=True)
    samples = [sample for at_once in zip(*seen, strict=True) for samples in at_once for sample in samples]
    lines = "".join(printed).splitlines()
    return samples, [line for line in lines if line.startswith("warning: the training data")]


def samples_of(config: Config, ranks: int = 1) -> Samples:
    return run(config, ranks)[0]


def changed(config: Config, save: str, **training: int | None) -> Config:
    return replace(
        config,
        training=replace(config.training, **training),
        checkpoint=replace(config.checkpoint, save=save),
    )


def resumed(config: Config, save: str, *, load: str, **training: int | None) -> Config:
    config = changed(config, save, **training)
    return replace(config, checkpoint=replace(config.checkpoint, load=load))


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory) -> list[str]:
    """Prefixes of 15 and 5 documents of 30 tokens: 28 and 9 samples of 16 a pass."""
    folder, random = tmp_path_factory.mktemp("sources"), numpy.random.default_rng(0)
    return [
        write_dataset(Path(folder) / name, [random.integers(0, 300, 30).tolist() for _ in range(count)])
        for name, count in (("a", 15), ("b", 5))
    ]


@pytest.fixture(scope="module")
def base(tiny_llama, two_sources) -> Config:
    """A run of 2 steps of 8 samples; 6 steps pass over this data more than once."""
    config = make_config(tiny_llama(), "", Path("unused"), steps=2)
    config.data.data_path, config.data.split, config.logging.eval_iters = two_sources, "1,0,0", 0
    return config


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Samples:
    """The samples of 6 steps of 8 in one go."""
    return samples_of(changed(base, str(tmp_path_factory.mktemp("whole") / "run"), train_iters=6))


@pytest.fixture(scope="module")
def stopped(base, whole, tmp_path_factory) -> str:
    """The run that has taken the first 2 of those steps, and knew of no more."""
    save = str(tmp_path_factory.mktemp("stopped") / "run")
    assert samples_of(changed(base, save)) == whole[:16]
    return save


@pytest.mark.distributed
@pytest.mark.parametrize(
    "steps, training, ranks",
    [
        pytest.param(4, {}, 1, id="more-steps-over-a-second-pass"),
        pytest.param(2, {"global_batch_size": 16}, 1, id="doubled-batch"),
        # 8 * 4 samples are within one pass of 37, which the position before them leaves
        pytest.param(6, {"global_batch_size": 4}, 2, id="halved-batch-on-two-ranks"),
        pytest.param(4, {"micro_batch_size": 8}, 1, id="other-micro-batch"),
        pytest.param(1, {"global_batch_size": 32}, 1, id="batch-that-does-not-divide-the-position"),
    ],
)
def test_a_resumed_run_reads_what_the_uninterrupted_one_would(base, whole, stopped, tmp_path, steps, training, ranks):
    config = resumed(base, str(tmp_path / "run"), load=stopped, train_iters=2 + steps, **training)
    end = 16 + steps * training.get("global_batch_size", 8)
    assert end > 37 and samples_of(config, ranks) == whole[16:end]
    path = newest_checkpoint(str(tmp_path / "run"))
    assert path is not None
    state = read_state(path)[0]
    assert (state.consumed_samples, state.tokens, state.step) == (end, end * 16, 2 + steps)


@pytest.mark.distributed
def test_epochs_go_on_exactly_and_the_schedule_knows_their_steps(base, whole, tmp_path):
    one = changed(base, str(tmp_path / "one"), train_iters=0, train_epochs=1)
    one.optimizer = replace(base.optimizer, lr_decay_iters=None, lr_warmup_iters=0, min_lr=1e-4)
    assert samples_of(one) == whole[:32]  # 37 samples a pass: 4 steps
    # linear from 1e-3 over the 4 steps of the data
    assert [line["lr"] for line in records(tmp_path / "one")] == pytest.approx([1e-3, 7.75e-4, 5.5e-4, 3.25e-4])
    one.optimizer.lr_warmup_iters = 4
    with pytest.raises(ConfigError, match="--lr-warmup-iters 4 leaves nothing of the 4 decay steps"):
        check(changed(one, str(tmp_path / "none")), 1)
    one.optimizer.lr_warmup_iters = 0
    two = resumed(one, str(tmp_path / "two"), load=str(tmp_path / "one"), train_epochs=2, global_batch_size=4)
    assert samples_of(two)[:16] == whole[32:48]
    assert records(tmp_path / "two")[-1]["step"] == 4 + (74 - 32) // 4
    again = resumed(two, str(tmp_path / "three"), load=str(tmp_path / "two"), train_epochs=1)
    with pytest.raises(ConfigError, match="--train-epochs 1 is 37 samples, but the checkpoint of --load has read 72"):
        check(again, 1)


@pytest.mark.distributed
def test_a_run_that_goes_on_with_a_doubled_batch_ends_at_its_budget(base, whole, stopped, tmp_path):
    """Of 46 samples' tokens 16 are read: two steps of 16 are the fewest that reach the rest."""
    budget = {"train_iters": None, "train_tokens": 46 * 16}
    doubled = resumed(base, str(tmp_path / "run"), load=stopped, **budget, global_batch_size=16)
    assert samples_of(doubled) == whole[16:48]
    assert records(tmp_path / "run")[-1]["tokens"] == 48 * 16
    finished = resumed(doubled, str(tmp_path / "run"), load=str(tmp_path / "run"), global_batch_size=8)
    assert check(finished.resolved(1), 1).config.train_iters == 4  # nothing is left, although it went past its budget
    for less, refusal in (
        ({"train_tokens": 32 * 16 - 1}, "iter_0000004 is past --train-tokens 511. Use a larger one"),
        ({"train_tokens": None, "train_samples": 32}, "iter_0000004 is past --train-samples 32. Use a larger one"),
    ):
        with pytest.raises(ConfigError, match=refusal):
            check(changed(finished, str(tmp_path / "run"), **less).resolved(1), 1)


@pytest.mark.distributed
def test_other_data_is_read_from_the_same_position_with_a_warning(base, whole, stopped, tmp_path):
    other = resumed(base, str(tmp_path / "other"), load=stopped, train_iters=6, seed=5)
    samples, warnings = run(other)
    assert samples == samples_of(changed(base, str(tmp_path / "fresh"), train_iters=6, seed=5))[16:] != whole[16:]
    assert len(warnings) == 1 and "the next sample is number 16 " in warnings[0]
    # From here on the other data is the run's own.
    assert run(resumed(other, str(tmp_path / "other"), load=str(tmp_path / "other"), train_iters=7))[1] == []


@pytest.mark.distributed
def test_a_checkpoint_that_knows_no_order_goes_on(base, whole, stopped, tmp_path):
    old = str(shutil.copytree(stopped, tmp_path / "old"))
    path = newest_checkpoint(old)
    assert path is not None
    values = json.loads((path / STATE_FILE).read_text())
    assert values["state"].pop("data_order") and values.pop("crc32")
    (path / STATE_FILE).write_text(json.dumps(values))
    assert run(resumed(base, old, load=old, train_iters=6)) == (whole[16:], [])


def times_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.mark.distributed
@pytest.mark.parametrize("is_resumed", [False, True], ids=["start", "resumed"])
def test_two_ranks_leave_a_cache_that_was_built_for_them_untouched(base, stopped, tmp_path, is_resumed):
    config = changed(base, str(tmp_path / "run"), train_iters=8)
    config = replace(config, data=replace(base.data, data_cache_path=str(tmp_path / "maps")))
    position: dict[str, int] = {}
    if is_resumed:
        config = resumed(config, str(tmp_path / "run"), load=stopped, global_batch_size=4)
        position = {"step": 2, "consumed_samples": 16}
    build_index_cache(config, **position, report=lambda line: None)
    before = times_of(tmp_path / "maps")
    samples_of(config, ranks=2)
    assert times_of(tmp_path / "maps") == before and len(before) > 5


def refusal_on_this_rank(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        build_datasets(config)
    return str(caught.value)


@pytest.mark.distributed
def test_a_cache_that_cannot_be_written_is_the_same_sentence_on_every_rank(base, tmp_path):
    (tmp_path / "file").write_text("")
    config = replace(base, data=replace(base.data, data_cache_path=str(tmp_path / "file")))
    first, second = run_ranks(2, refusal_on_this_rank, config)
    assert first == second and "Give --data-cache-path a folder that can be written" in first
