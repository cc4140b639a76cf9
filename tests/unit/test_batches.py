"""The data of a run: what is refused before anything starts, and which samples each rank sees in which order."""

import json
import logging
import multiprocessing
import os
import sys
from pathlib import Path

import numpy
import pytest
import torch

import tiny_data
from config_cases import data_config
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.data import datasets
from megatron_lrc.data.batches import BatchIterator, default_workers
from megatron_lrc.data.data_checks import check_data
from megatron_lrc.data.datasets import build_datasets
from megatron_lrc.data.indexing import IndexingOptions, index_documents
from megatron_lrc.data.tokenizers import load_tokenizer
from tiny_data import numbered
from tokenizer_files import copy_with

VOCABULARY = 320
CPU = torch.device("cpu")


@pytest.fixture
def prepared(tmp_path, tokenizer_folder):
    """Prefix of a dataset with its manifest: 60 documents."""
    options = IndexingOptions(
        input=[tiny_data.write_jsonl(tmp_path / "a.jsonl", tiny_data.make_texts(60))],
        output_prefix=str(tmp_path / "o"),
        tokenizer_model=tokenizer_folder,
        append_eod=True,
    )
    index_documents(options, report=lambda line: None)
    return str(tmp_path / "o_text_document")


def iterate(dataset, *, micro: int = 2, dp_rank: int = 0, dp_size: int = 1, consumed: int = 0, workers: int = 0):
    return BatchIterator(
        dataset,
        micro_batch_size=micro,
        global_batch_size=8,
        dp_rank=dp_rank,
        dp_size=dp_size,
        consumed_samples=consumed,
        device=CPU,
        num_workers=workers,
    )


def refusal(config: Config, *, vocabulary: int = VOCABULARY) -> str:
    with pytest.raises(ConfigError) as caught:
        check_data(config, vocabulary)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- check_data ---


def test_good_data_passes(prepared, tokenizer_folder):
    check_data(data_config(data_path=[prepared], split="80,20,0", teacher=tokenizer_folder), VOCABULARY)


def test_training_without_data_is_refused():
    assert "--train-iters 6 needs training data" in refusal(data_config())
    assert "--init pca (for its calibration) needs" in refusal(data_config(train_iters=0, init="pca"))
    assert "--init ridge (for its calibration) needs" in refusal(data_config(train_iters=0, init="ridge"))
    check_data(data_config(train_iters=0), VOCABULARY)
    check_data(data_config(train_iters=0, init="orthogonal"), VOCABULARY)
    check_data(data_config(train_iters=0, init="pca", load="run"), VOCABULARY)


@pytest.mark.parametrize("flag", ["data_path", "train_data_path"])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_named(prepared, flag, suffix):
    os.remove(prepared + suffix)
    assert f"There is no {prepared}{suffix}" in refusal(data_config(**{flag: [prepared]}))


@pytest.mark.parametrize("given", ["o", "o_text_document.bin", "o_text_documnet"])
def test_a_prefix_that_is_nearly_right_is_answered_with_the_right_one(prepared, given):
    path = str(Path(prepared).with_name(given))
    assert f"There is no {path}.idx; was {prepared} meant?" in refusal(data_config(data_path=[path]))


@pytest.mark.parametrize("weight", ["inf", "nan", "0", "-1"])
def test_a_weight_that_is_no_number_above_0_is_refused(prepared, weight):
    assert "a weight is not above 0 and finite" in refusal(data_config(data_path=["1", prepared, weight, prepared]))


def test_missing_validation_data_is_refused(tmp_path):
    train = numbered(tmp_path / "train", 10)
    config = data_config(train_data_path=[train], valid_data_path=["nowhere"])
    assert f"There is no {os.path.abspath('nowhere')}.idx" in refusal(config, vocabulary=1000)


def test_truncated_bin_is_refused_with_both_sizes(prepared):
    size = os.path.getsize(f"{prepared}.bin")
    os.truncate(f"{prepared}.bin", size - 2)
    message = refusal(data_config(data_path=[prepared]))
    assert f"{prepared}.bin has {size - 2} bytes where {prepared}.idx says {size}" in message


def test_truncated_index_is_refused(prepared):
    size = os.path.getsize(f"{prepared}.idx")
    os.truncate(f"{prepared}.idx", size - 8)
    assert f"{prepared}.idx has {size - 8} bytes where its header says {size}" in refusal(
        data_config(data_path=[prepared])
    )


@pytest.mark.parametrize("content", [b"", b"MMIDIDX", b"PK\x03\x04" + bytes(60), b"MMIDIDX\x00\x00" + bytes(60)])
def test_index_of_another_format_is_refused(prepared, content):
    Path(f"{prepared}.idx").write_bytes(content)
    assert "is not an index of megatron-core's format" in refusal(data_config(data_path=[prepared]))


def test_wrong_tokenizer_is_refused_naming_both(prepared, tokenizer_folder, tmp_path):
    other = tiny_data.write_tokenizer(tmp_path / "other", words=["something", "else"])
    message = refusal(data_config(data_path=[prepared], teacher=other))
    assert f"{prepared} was made with the tokenizer {tokenizer_folder}" in message
    assert f"the run's is that of --teacher {other}" in message
    message = refusal(data_config(data_path=[prepared], teacher=tokenizer_folder, tokenizer_model=other))
    assert f"--tokenizer-model {other} is not the tokenizer of the teacher {tokenizer_folder}" in message


def test_a_tokenizer_that_splits_text_otherwise_is_another_one(prepared, tokenizer_folder, tmp_path):
    """Both have the same vocabulary and special tokens, and the data is within it."""
    by_bytes = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
    other = str(copy_with(Path(tokenizer_folder), tmp_path / "other", pre_tokenizer=by_bytes))
    assert "was made with the tokenizer" in refusal(data_config(data_path=[prepared], teacher=other))
    message = refusal(data_config(data_path=[prepared], teacher=tokenizer_folder, tokenizer_model=other))
    assert "of 34 test texts get other ids" in message
    copy = str(copy_with(Path(tokenizer_folder), tmp_path / "copy"))
    config = data_config(data_path=[prepared], split="80,20,0", teacher=tokenizer_folder, tokenizer_model=copy)
    assert check_data(config, VOCABULARY) == load_tokenizer(tokenizer_folder).fingerprint


def test_data_of_a_version_that_did_not_record_the_rules_is_refused(prepared, tokenizer_folder):
    manifest = json.loads(Path(f"{prepared}.json").read_text())
    tokenizer = {**manifest["tokenizer"], "fingerprint": "0" * 64}
    del tokenizer["probes"], tokenizer["kind"]
    Path(f"{prepared}.json").write_text(json.dumps({**manifest, "tokenizer": tokenizer}))
    message = refusal(data_config(data_path=[prepared], teacher=tokenizer_folder))
    assert "an earlier version wrote it, without how text is split" in message


def test_ids_that_only_the_teachers_own_tokenizer_has_do_no_harm_while_the_data_has_none(prepared, tokenizer_folder):
    """A padding token one beyond the embedding (transformers #24899)."""
    config = data_config(data_path=[prepared], split="80,20,0", teacher=tokenizer_folder)
    tokenizer, tokens = load_tokenizer(tokenizer_folder), numpy.fromfile(f"{prepared}.bin", numpy.uint16)
    largest = tokenizer.vocab_size - 5
    tokens.clip(max=largest).tofile(f"{prepared}.bin")
    assert check_data(config, largest + 1) == tokenizer.fingerprint
    assert f"token id {largest}, but the teacher's ids are 0 to {largest - 1}" in refusal(config, vocabulary=largest)
    config.data.eod_mask_loss = True
    assert f"--eod-mask-loss needs the end-of-document token {tokenizer.eod}" in refusal(
        config, vocabulary=tokenizer.eod
    )


def test_a_tokenizer_that_is_larger_than_a_teacher_without_one_is_refused(prepared, tokenizer_folder, tmp_path):
    config = data_config(data_path=[prepared], teacher=str(tmp_path), tokenizer_model=tokenizer_folder)
    message = refusal(config, vocabulary=100)
    assert "token ids, but the teacher" in message and "has 100" in message


def test_token_ids_beyond_the_teacher_are_refused_without_a_manifest(tmp_path, caplog):
    prefix = numbered(tmp_path / "n", 10)
    with caplog.at_level(logging.WARNING):
        check_data(data_config(data_path=[prefix], split="1,1"), 400)
    assert f"{prefix}.json does not exist" in caplog.text
    message = refusal(data_config(data_path=[prefix], split="1,1"), vocabulary=399)
    assert "token id 399, but the teacher's ids are 0 to 398" in message


def test_manifest_of_another_dataset_is_refused(prepared):
    manifest = json.loads(Path(f"{prepared}.json").read_text())
    Path(f"{prepared}.json").write_text(json.dumps({**manifest, "documents": 59}))
    assert "describes 59 documents" in refusal(data_config(data_path=[prepared]))
    Path(f"{prepared}.json").write_text("[]")
    assert "is not a manifest" in refusal(data_config(data_path=[prepared]))


def test_too_few_tokens_for_one_sample_is_refused(tmp_path):
    prefix = numbered(tmp_path / "n", 10, length=10)
    message = refusal(data_config(data_path=[prefix], split="90,10,0"), vocabulary=1000)
    assert "The validation part of --split 90,10,0" in message and "has 10 tokens (1 of 10 documents)" in message
    message = refusal(data_config(data_path=[prefix], split="99,1,0"), vocabulary=1000)
    assert "has 0 tokens" in message  # megatron-core would count epochs of nothing forever
    check_data(data_config(data_path=[prefix], split="99,1,0", eval_iters=0), 1000)
    message = refusal(data_config(train_data_path=[prefix], seq_length=100), vocabulary=1000)
    assert "The training part of" in message and "one sample takes 101" in message


def test_data_flags_that_contradict_are_refused(prepared):
    assert "excludes" in refusal(data_config(data_path=[prepared], train_data_path=[prepared]))
    assert "--valid-data-path stands beside" in refusal(data_config(valid_data_path=[prepared]))
    assert "do not alternate" in refusal(data_config(data_path=["1", prepared, prepared, prepared]))
    assert "not above 0" in refusal(data_config(data_path=["0", prepared, "1", prepared]))
    for split in ("a,b", "0,1", "-1,2", "1,1,1,1", ""):
        assert f"--split {split}: expected" in refusal(data_config(data_path=[prepared], split=split))


def test_eod_mask_loss_needs_an_eod(tmp_path):
    endless = tiny_data.write_tokenizer(tmp_path / "no_eos", eos=False)
    prefix = numbered(tmp_path / "n", 8)
    config = data_config(data_path=[prefix], split="1,1", teacher=endless, eod_mask_loss=True)
    assert "--eod-mask-loss needs an end-of-document token" in refusal(config)


# --- build_datasets ---


def test_samples_are_consecutive_tokens_with_shifted_labels(tmp_path):
    train, valid = build_datasets(data_config(data_path=[numbered(tmp_path / "n", 20)], split="80,20,0"))
    assert len(train) >= 48 and len(valid) >= 16
    seen = set()
    for sample in (train[index] for index in range(48)):
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert torch.equal(sample["position_ids"], torch.arange(16))
        assert sample["loss_mask"].tolist() == [1.0] * 16
        seen |= set(sample["tokens"].tolist())
    assert max(seen) < 16 * 40  # the first 16 documents are the training part
    assert all(valid[index]["tokens"].min() >= 16 * 40 for index in range(16))


def test_split_with_an_empty_part(tmp_path):
    prefix = numbered(tmp_path / "n", 20)
    assert build_datasets(data_config(data_path=[prefix], split="100,0,0"))[1] is None
    assert build_datasets(data_config(data_path=[prefix], split="80,20,0", eval_iters=0))[1] is None
    assert build_datasets(data_config(data_path=[prefix]))[1] is not None  # 969,30,1: no document left for testing
    assert build_datasets(data_config(train_iters=0)) == (None, None)


def test_the_last_label_of_every_sample_can_be_masked(prepared):
    flags = {"data_path": [prepared], "split": "1,1"}
    masked = build_datasets(data_config(**flags, mask_last_label=True))
    for dataset, plain in zip(masked, build_datasets(data_config(**flags)), strict=True):
        for index in (0, 1, 0):  # megatron-core keeps the first mask for later
            expected = plain[index]["loss_mask"].clone()
            assert expected.sum() == 16
            expected[-1] = 0
            assert torch.equal(dataset[index]["loss_mask"], expected)
            assert all(torch.equal(dataset[index][name], plain[index][name]) for name in ("tokens", "labels"))


def test_eod_mask_loss_masks_predictions_from_eod(prepared, tokenizer_folder):
    config = data_config(data_path=[prepared], split="1,1", teacher=tokenizer_folder, eod_mask_loss=True)
    check_data(config, VOCABULARY)
    train, _ = build_datasets(config)
    eod = json.loads(Path(f"{prepared}.json").read_text())["tokenizer"]["eod"]
    masks = [(train[index]["loss_mask"], train[index]["tokens"]) for index in range(40)]
    assert all(torch.equal(mask == 0, tokens == eod) for mask, tokens in masks)
    assert any((mask == 0).any() for mask, _ in masks)


def test_calibration_lengthens_the_training_data(tmp_path):
    prefix = numbered(tmp_path / "n", 20)
    config = data_config(data_path=[prefix], split="1,1", train_iters=0, init="pca", calibration_tokens=16 * 8 * 3 + 1)
    train, _ = build_datasets(config)
    assert datasets.num_calibration_batches(config) == 4
    assert len(list(iterate(train))) >= 4 * 4


def test_separate_training_and_validation_data(tmp_path):
    train_prefix, valid_prefix = numbered(tmp_path / "t", 20), numbered(tmp_path / "v", 5, first=5000)
    train, valid = build_datasets(data_config(train_data_path=[train_prefix], valid_data_path=[valid_prefix]))
    assert train[0]["tokens"].max() < 5000 <= valid[0]["tokens"].min()
    assert len(valid) >= 16  # 200 tokens, repeated
    assert build_datasets(data_config(train_data_path=[train_prefix]))[1] is None


def share_of_second(dataset) -> float:
    return sum(int(dataset[index]["tokens"][0] >= 5000) for index in range(len(dataset))) / len(dataset)


def test_blend_follows_weights_or_tokens(tmp_path):
    first, second = numbered(tmp_path / "a", 60), numbered(tmp_path / "b", 20, first=5000)
    weighted, _ = build_datasets(data_config(data_path=["1", first, "4", second], split="1,1"))
    assert share_of_second(weighted) == pytest.approx(0.8, abs=0.05)
    by_tokens, _ = build_datasets(data_config(train_data_path=[first, second], train_iters=100))
    assert len(by_tokens) >= 800  # more than one pass
    assert share_of_second(by_tokens) == pytest.approx(0.25, abs=0.01)


def test_blend_of_many_uneven_weights(tmp_path):
    """megatron-core's own surplus of 0.005 raises IndexError here."""
    paths = ["91", numbered(tmp_path / "big", 2, length=17)]
    for number in range(9):
        paths += ["1", numbered(tmp_path / f"small{number}", 2, length=17)]
    train, _ = build_datasets(data_config(train_data_path=paths, train_iters=2, global_batch_size=5))
    assert len(train) >= 10


def test_data_written_anew_does_not_meet_old_maps(tmp_path):
    prefix = numbered(tmp_path / "n", 40)
    build_datasets(data_config(train_data_path=[prefix]))
    numbered(tmp_path / "n", 4, first=7000)
    train, _ = build_datasets(data_config(train_data_path=[prefix]))
    assert all(train[index]["tokens"].min() >= 7000 for index in range(48))


def test_maps_are_cached_whole_and_found_again(tmp_path, monkeypatch):
    config = data_config(train_data_path=[numbered(tmp_path / "n", 20)], data_cache_path=str(tmp_path / "maps"))
    first, _ = build_datasets(config)
    (folder,) = (tmp_path / "maps").iterdir()
    assert ".tmp" not in folder.name
    monkeypatch.setattr(datasets.Request, "write_maps", lambda self, folder: pytest.fail("built again"))
    again, _ = build_datasets(config)
    assert all(torch.equal(first[index]["tokens"], again[index]["tokens"]) for index in range(48))


def test_failed_build_leaves_no_maps(tmp_path, monkeypatch):
    config = data_config(train_data_path=[numbered(tmp_path / "n", 20)])
    original = datasets.Request.write_maps

    def write_then_fail(self, folder):
        original(self, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets.Request, "write_maps", write_then_fail)
    with pytest.raises(KeyboardInterrupt):
        build_datasets(config)
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    prefix = numbered(tmp_path / "n", 20)
    config = data_config(train_data_path=[prefix], data_cache_path=str(tmp_path / "file" / "maps"))
    with pytest.raises(ConfigError, match="Give --data-cache-path a folder"):
        build_datasets(config)


def build_on_rank(rank: int, meeting: str, config: Config, results: multiprocessing.Queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    train, valid = build_datasets(config)
    results.put((rank, [dataset[index]["tokens"].tolist() for dataset in (train, valid) for index in range(16)]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.timeout(180)
def test_all_ranks_build_the_same_datasets(tmp_path):
    first, second = numbered(tmp_path / "a", 20), numbered(tmp_path / "b", 20, first=5000)
    config = data_config(data_path=["1", first, "2", second], split="1,1,0")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (str(tmp_path / "meeting"), config, results)
    ranks = [context.Process(target=build_on_rank, args=(rank, *arguments)) for rank in range(2)]
    try:
        for process in ranks:
            process.start()
        samples = dict(results.get(timeout=150) for _ in ranks)
        for process in ranks:
            process.join(timeout=30)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
    train, valid = build_datasets(config)
    alone = [dataset[index]["tokens"].tolist() for dataset in (train, valid) for index in range(16)]
    assert samples[0] == samples[1] == alone


# --- BatchIterator ---


@pytest.fixture(scope="module")
def train_dataset(tmp_path_factory):
    prefix = numbered(tmp_path_factory.mktemp("data") / "n", 40)
    return build_datasets(data_config(train_data_path=[prefix]))[0]


def tokens_of(batches) -> list[list[int]]:
    return [row for batch in batches for row in batch["tokens"].tolist()]


def test_batches_have_shape_dtype_and_only_the_known_keys(tmp_path):
    paths = [numbered(tmp_path / "a", 20), numbered(tmp_path / "b", 20)]
    train, _ = build_datasets(data_config(train_data_path=paths))
    batch = next(iterate(train))
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in batch.items()} == {
        "tokens": (torch.int64, (2, 16)),
        "labels": (torch.int64, (2, 16)),
        "loss_mask": (torch.float32, (2, 16)),
        "position_ids": (torch.int64, (2, 16)),
    }


def test_others_read_where_a_gpu_would_wait():
    assert [default_workers(torch.device(name)) for name in ("cuda", "cpu")] == [2, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_documents_are_found_before_the_copy_to_the_device(workers):
    """On the device, here one that holds no values, they could not be found without waiting for it."""
    positions = torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2], [0, 1, 2, 3], [0, 1, 0, 1]])
    samples = [dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"), row) for row in positions]
    batches = BatchIterator(
        samples,  # type: ignore[arg-type]
        micro_batch_size=2,
        global_batch_size=4,
        dp_rank=0,
        dp_size=1,
        consumed_samples=0,
        device=torch.device("meta"),
        num_workers=workers,
        finds_documents=True,
    )
    found = list(batches)
    assert [batch.pop("documents").tolist() for batch in found] == [
        [[0, 0, 3], [0, 3, 4], [1, 0, 1], [1, 1, 4]],
        [[0, 0, 4], [1, 0, 2], [1, 2, 4]],
    ]
    assert {tensor.device.type for batch in found for tensor in batch.values()} == {"meta"}


@pytest.mark.parametrize("dp_size, micro", [(1, 2), (1, 8), (2, 2), (2, 4), (4, 1), (4, 2)])
def test_global_batches_do_not_depend_on_the_layout(train_dataset, dp_size, micro):
    expected = tokens_of(iterate(train_dataset, micro=1))
    ranks = [list(iterate(train_dataset, micro=micro, dp_rank=rank, dp_size=dp_size)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    per_step = 8 // (micro * dp_size)
    for step in range(len(expected) // 8):
        rows = [batches[step * per_step : (step + 1) * per_step] for batches in ranks]
        merged = [row for micro_batches in zip(*rows, strict=True) for row in tokens_of(micro_batches)]
        assert merged == expected[step * 8 : (step + 1) * 8]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_iteration_equals_the_uninterrupted(train_dataset, workers):
    whole = tokens_of(iterate(train_dataset, dp_rank=1, dp_size=2))
    batches = iterate(train_dataset, dp_rank=1, dp_size=2, workers=workers)
    start = tokens_of(next(batches) for _ in range(4))
    assert batches.consumed_samples == 16
    rest = tokens_of(iterate(train_dataset, dp_rank=1, dp_size=2, consumed=16, workers=workers))
    assert start + rest == whole


def test_iteration_ends_with_the_last_full_global_batch(train_dataset):
    batches = iterate(train_dataset)
    assert len(tokens_of(batches)) == len(train_dataset) // 8 * 8
    assert batches.consumed_samples == len(train_dataset) // 8 * 8
    with pytest.raises(StopIteration):
        next(batches)


def test_iteration_leaves_torchs_random_state_alone(train_dataset):
    before = torch.get_rng_state()
    next(iterate(train_dataset))
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_compiled_helpers_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    with pytest.raises(ConfigError, match="no compiled dataset helpers for this Python"):
        build_datasets(data_config(train_data_path=[numbered(tmp_path / "n", 20)]))
