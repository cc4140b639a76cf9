"""--train-epochs: every token of every dataset exactly that often, counted in steps before anything is built."""

from dataclasses import replace

import numpy
import pytest
import torch

from config_cases import data_config
from megatron_lrc.config import Config, ConfigError, load_yaml, save_yaml, validate
from megatron_lrc.data.batches import BatchIterator
from megatron_lrc.data.data_checks import check_data
from megatron_lrc.data.datasets import build_datasets, resolve_train_iters
from megatron_lrc.methods import method_of
from tiny_data import numbered

SECOND = 40000  # token ids from here on are the second dataset's


def resolved(paths: list[str], num_epochs: int, **values: object) -> Config:
    return resolve_train_iters(
        data_config(**{"train_data_path": paths, "train_iters": 0, "train_epochs": num_epochs, **values})
    )


def refusal(paths: list[str], num_epochs: int, **values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(paths, num_epochs, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def batches_of(config: Config, *, step: int = 0, consumed_samples: int = 0) -> BatchIterator:
    train, _ = build_datasets(config, step=step, consumed_samples=consumed_samples)
    assert train is not None and config.training.global_batch_size is not None
    return BatchIterator(
        train,
        micro_batch_size=1,
        global_batch_size=config.training.global_batch_size,
        dp_rank=0,
        dp_size=1,
        consumed_samples=consumed_samples,
        device=torch.device("cpu"),
        num_workers=0,
    )


def count_tokens(config: Config, *, key: str = "tokens") -> numpy.ndarray:
    """How often each token id has been read by the end of each epoch of a run: [epochs, ids]."""
    batches = batches_of(config)
    per_epoch, rest = divmod(config.training.train_iters, config.training.train_epochs)
    assert rest == 0
    epochs = [torch.cat([next(batches)[key] for _ in range(per_epoch)]) for _ in range(config.training.train_epochs)]
    return numpy.cumsum([numpy.bincount(epoch.flatten(), minlength=1 << 16) for epoch in epochs], axis=0)


@pytest.mark.parametrize("num_epochs", [1, 3])
@pytest.mark.parametrize("sizes", [[50], [700, 3]], ids=["one", "very-uneven-blend"])
def test_every_token_is_read_exactly_that_often(tmp_path, sizes, num_epochs):
    """But for the tail of each pass, shorter than a sample, which is another one each time."""
    paths = [numbered(tmp_path / f"{n}", size, first=n * SECOND) for n, size in enumerate(sizes)]
    config = resolved(paths, num_epochs, global_batch_size=1)
    per_pass = sum((size * 40 - 1) // 16 for size in sizes)
    assert config.training.train_iters == num_epochs * per_pass
    counts = count_tokens(config)
    for number, size in enumerate(sizes):
        tokens = size * 40
        of_dataset = counts[:, number * SECOND : number * SECOND + tokens]
        tail = tokens - (tokens - 1) // 16 * 16
        assert 1 <= tail <= 16
        for done in range(1, num_epochs + 1):  # each pass is whole before the next one begins
            count = of_dataset[done - 1]
            assert count.max() == done
            assert (done - count).sum() == done * tail
    assert counts[-1].sum() == num_epochs * per_pass * 16


def test_every_token_but_a_tail_is_a_label_as_often(tmp_path):
    labels = count_tokens(resolved([numbered(tmp_path / "n", 50)], 2, global_batch_size=1), key="labels")[-1]
    assert labels.max() == 2 and (2 - labels[:2000]).sum() == 2 * (2000 - 1999 // 16 * 16)


def test_steps_are_whole_global_batches_of_all_epochs(tmp_path):
    paths = [numbered(tmp_path / "a", 20), numbered(tmp_path / "b", 5)]  # 49 and 12 samples a pass
    assert [resolved(paths, epochs).training.train_iters for epochs in (1, 2, 3)] == [7, 15, 22]
    split = {"train_data_path": [], "data_path": paths, "split": "80,20,0"}  # 39 and 9 samples
    assert resolved(paths, 1, **split).training.train_iters == 6
    config = data_config(train_data_path=paths)
    assert resolve_train_iters(config) is config


def test_validation_of_a_blend_passes_over_its_data_as_often_as_needed(tmp_path):
    paths = [numbered(tmp_path / "a", 20), numbered(tmp_path / "b", 5)]
    config = resolved([], 1, data_path=paths, split="80,20,0", eval_iters=9)
    _, valid = build_datasets(config)
    assert valid is not None and len(valid) >= 72 > valid.order.samples_per_pass


def test_a_resumed_run_takes_the_samples_that_are_left(tmp_path):
    config = data_config(train_data_path=[numbered(tmp_path / "n", 20)], train_iters=0, train_epochs=2)  # 98 samples

    def steps(**position: int) -> int:
        return resolve_train_iters(config, **position).training.train_iters

    assert steps() == steps(step=3, consumed_samples=24) == 12
    assert steps(step=3, consumed_samples=48) == 3 + 50 // 8  # its batch was 16
    assert steps(step=30, consumed_samples=97) == 30
    config.training.global_batch_size = 20  # its whole batches from 0 on end at 80, those from 24 on at 84
    config = resolve_train_iters(config, step=3, consumed_samples=24)
    assert len(list(batches_of(config, step=3, consumed_samples=24))) == 20 * (config.training.train_iters - 3) == 60
    with pytest.raises(ConfigError, match="--train-epochs 2 is 98 samples, but the checkpoint of --load has read 99"):
        steps(step=30, consumed_samples=99)


def test_epochs_that_cannot_be_exact_are_refused_in_one_sentence(tmp_path):
    first, second = numbered(tmp_path / "a", 20), numbered(tmp_path / "b", 5)
    message = refusal(["1", first, "2", second], 2)
    assert "which the weights of --train-data-path contradict" in message
    assert "one step takes --global-batch-size 50" in refusal([first], 1, global_batch_size=50)
    with pytest.raises(ConfigError, match="--train-epochs 1 needs training data"):
        check_data(data_config(train_iters=0, train_epochs=1), 100)


def test_validation_of_flags_knows_epochs(tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    good = data_config(teacher=str(teacher), student_hidden_size=8, train_iters=0, train_epochs=2, data_path=["text"])
    validate(method_of(good))

    def errors(**training: int) -> str:
        with pytest.raises(ConfigError) as caught:
            validate(method_of(replace(good, training=replace(good.training, **training))))
        return str(caught.value)

    both = "--train-iters 5 and --train-epochs 2 are given together. A run has one budget: keep one."
    assert errors(train_iters=5) == both
    assert errors(train_epochs=-1) == "--train-epochs is -1; it must be at least 0."
    assert "--train-iters 0 without --save" in errors(train_epochs=0)
    good.data.data_path = []
    assert errors() == "--train-epochs 2 needs training data. Give --data-path or --train-data-path."


def test_a_saved_configuration_counts_the_steps_again(tmp_path):
    config = resolved([numbered(tmp_path / "n", 20)], 2)
    assert config.training.train_iters == 12
    save_yaml(config, tmp_path / "config.yaml")
    read = load_yaml(tmp_path / "config.yaml")
    assert (read.training.train_epochs, read.training.train_iters) == (2, None)
    read.training.global_batch_size = 16
    assert resolve_train_iters(read).training.train_iters == 6
