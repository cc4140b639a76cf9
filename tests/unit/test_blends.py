"""The order of samples: GPTDataset's passes one after another, blended; a run only says how far."""

from itertools import pairwise

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from config_cases import data_config
from megatron_lrc.data import sample_order
from megatron_lrc.data.datasets import OrderedDataset, build_datasets
from megatron_lrc.data.loaded_tokenizer import TokenizerIdentity
from tiny_data import numbered, write_dataset

SECOND = 30000  # token ids from here on are the second dataset's


def training_data(**values: object) -> OrderedDataset:
    train, _ = build_datasets(data_config(**values))
    assert train is not None
    return train


def tokens_of(dataset: OrderedDataset, count: int) -> list[list[int]]:
    return [dataset[index]["tokens"].tolist() for index in range(count)]


def count_second(dataset: OrderedDataset, count: int) -> int:
    return sum(tokens[0] >= SECOND for tokens in tokens_of(dataset, count))


@pytest.fixture
def two(tmp_path) -> tuple[str, str]:
    """60 documents of 40 tokens (149 samples of 16), and 5 (12 samples)."""
    return numbered(tmp_path / "a", 60), numbered(tmp_path / "b", 5, first=SECOND)


def test_training_and_validation_blends_each_keep_their_own_weights(two, tmp_path):
    first, second = two
    third, fourth = numbered(tmp_path / "c", 9), numbered(tmp_path / "d", 9, first=SECOND)
    train, valid = build_datasets(
        data_config(
            train_data_path=["1", first, "3", second],
            valid_data_path=["3", third, "2", fourth],
            train_iters=10,
            eval_iters=5,
        )
    )
    assert train is not None and valid is not None
    assert count_second(train, 80) == 60 and count_second(valid, 40) == 16
    for count in (4, 20, 40):  # at every point, not only at the end
        assert abs(count_second(train, count) - 0.75 * count) <= 1
        assert abs(count_second(valid, count) - 0.4 * count) <= 1


@pytest.mark.parametrize("weights", [None, ("1", "3")], ids=["by-size", "weighted"])
def test_a_longer_request_only_adds_samples_behind(two, weights):
    paths = list(two) if weights is None else [weights[0], two[0], weights[1], two[1]]
    short = training_data(train_data_path=paths, train_iters=1)
    lengths = [len(short)]
    for steps in (21, 50, 80):
        longer = training_data(train_data_path=paths, train_iters=steps)
        assert tokens_of(longer, len(short)) == tokens_of(short, len(short))
        lengths.append(len(longer))
        short = longer
    assert all(shorter < longer for shorter, longer in pairwise(lengths))


@pytest.mark.parametrize("weights", [None, ("1", "3")], ids=["by-size", "weighted"])
def test_a_dataset_begins_a_pass_only_when_the_one_before_is_through(two, weights):
    paths = list(two) if weights is None else [weights[0], two[0], weights[1], two[1]]
    dataset = training_data(train_data_path=paths, train_iters=80)
    second = [tokens for tokens in tokens_of(dataset, 640) if tokens[0] >= SECOND]
    assert len(second) > 36
    passes = [second[start : start + 12] for start in range(0, len(second) - 11, 12)]
    for one_pass in passes:
        tokens = [token for sample in one_pass for token in sample]
        assert len(set(tokens)) == 12 * 16
    assert all(one != other for one, other in pairwise(passes))


def test_every_pass_is_the_gptdatasets_own_of_its_seed(two):
    prefix = two[0]
    ours = training_data(train_data_path=[prefix], train_iters=50, seed=7)
    for number in range(2):
        config = GPTDatasetConfig(
            random_seed=sample_order._pass_seed(7, number),
            sequence_length=16,
            blend_per_split=[([prefix], None), None, None],
            path_to_cache=None,
            tokenizer=TokenizerIdentity(fingerprint="", vocab_size=0, eod=None),  # type: ignore[arg-type]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
        )
        indexed = GPTDataset.build_low_level_dataset(prefix, config)
        theirs = GPTDataset(indexed, None, numpy.arange(60, dtype=numpy.int32), None, Split.train, config)
        assert len(theirs) == 149
        for index in range(149):
            sample, expected = ours[number * 149 + index], theirs[index]
            assert torch.equal(sample["tokens"], expected["tokens"])
            assert torch.equal(sample["labels"], expected["labels"])
    assert sample_order._pass_seed(7, 0) == 7 and sample_order._pass_seed(7, 1) != 8


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    seq_length=st.integers(2, 30),
    num_passes=st.integers(1, 4),
)
def test_maps_cut_any_documents_into_whole_samples(tmp_path_factory, lengths, seq_length, num_passes):
    if sum(lengths) <= seq_length:
        lengths = [*lengths, seq_length + 1]
    folder = tmp_path_factory.mktemp("any")
    starts = numpy.cumsum([0, *lengths])
    documents = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]
    dataset = training_data(
        train_data_path=[write_dataset(folder / "n", documents)],
        seq_length=seq_length,
        global_batch_size=1,
        train_iters=num_passes * ((sum(lengths) - 1) // seq_length),
    )
    per_pass = dataset.order.samples_per_pass
    assert len(dataset) == num_passes * per_pass
    counts = numpy.zeros(sum(lengths), dtype=int)
    for index in range(len(dataset)):
        sample = dataset[index]
        assert len(sample["tokens"]) == seq_length and torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        counts += numpy.bincount(sample["tokens"], minlength=len(counts))
        if (index + 1) % per_pass == 0:
            assert counts.max() <= (index + 1) // per_pass
    assert counts.sum() == len(dataset) * seq_length


def test_the_identity_of_an_order_is_what_decides_it(two):
    def identity(**values: object) -> str:
        return training_data(**values).order.identity

    first, second = two
    same = [
        identity(data_path=[first, second], split="1,1"),
        identity(data_path=[first, second], split="2,2", train_iters=60, global_batch_size=4, eval_iters=0),
    ]
    others = [
        identity(data_path=[second, first], split="1,1"),
        identity(data_path=["1", first, "1", second], split="1,1"),
        identity(data_path=["1", first, "2", second], split="1,1"),
        identity(data_path=[first, second], split="2,1"),
        identity(data_path=[first, second], split="1,1", seed=1),
        identity(data_path=[first, second], split="1,1", seq_length=8),
        identity(data_path=[first], split="1,1"),
    ]
    assert len(set(same)) == 1 and len({*same, *others}) == 1 + len(others)
    assert identity(data_path=["2", first, "4", second], split="1,1") == others[2]


def test_a_resumed_run_has_the_samples_behind_its_position(two):
    """2 steps of 8 were taken; the other 3 of 6 or of 32 follow, whatever 5 steps of that size would have been."""
    weighted = ["1", two[0], "3", two[1]]
    for batch_size in (6, 32):
        config = data_config(train_data_path=weighted, train_iters=5, global_batch_size=batch_size)
        train, _ = build_datasets(config, step=2, consumed_samples=16)
        assert train is not None and len(train) == 16 + 3 * batch_size


def test_a_dataset_whose_turn_does_not_come_is_no_error(two):
    dataset = training_data(train_data_path=["1", two[1], "1", two[0]], train_iters=1, global_batch_size=1)
    assert len(dataset) == count_second(dataset, 1) == 1
