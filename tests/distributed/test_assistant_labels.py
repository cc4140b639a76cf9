"""What is not the assistant's is context and never a label: on every layout, of every method.

Labels that do not count, and tokens (with their hidden states and logits, the teacher's too) that nothing sees which
counts, are others on the ranks than in the reference, or in one run than in the next. Nothing may change.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from gradient_cases import VOCAB, Layout, Sizes, compare_with_the_reference, global_batch
from megatron_lrc.checkpoints.run_directory import newest_checkpoint
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.train.start_checks import check
from method_runs import opened_config, ordinary_config, sheared_config
from runs import continued, make_config, on_layout, records, train, without_times
from stored_tensors import digest, read_tensors
from tiny_data import write_chats, write_dataset

pytestmark = pytest.mark.distributed

CORRUPTED = Sizes(turns=True, corrupted=True)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2),
        pytest.param(Layout(pp=2), marks=pytest.mark.slow),
        pytest.param(Layout(cp=2), marks=pytest.mark.slow),
        pytest.param(Layout(dp=2), marks=pytest.mark.slow),
        pytest.param(Layout(tp=2, pp=2, chunks=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_and_gradients_are_the_references_whatever_is_at_other_positions(tiny_llama, layout):
    clean, corrupted = global_batch(replace(CORRUPTED, corrupted=False)), global_batch(CORRUPTED)
    counts = clean["loss_mask"].bool()
    assert not counts[:6].any() and counts[6:].any(1).all()  # a micro-batch of which nothing counts
    assert (clean["labels"] != corrupted["labels"]).equal(~counts)
    assert (clean["tokens"] != corrupted["tokens"]).sum() > 6 * 16
    teacher = tiny_llama(num_layers=4, vocab_size=VOCAB, dtype=torch.float64)
    compare_with_the_reference(teacher, layout, tied=False, sizes=CORRUPTED)


@pytest.fixture(scope="session")
def model(tiny_llama) -> str:
    return tiny_llama(num_layers=2)


@pytest.fixture(scope="session")
def chats(tmp_path_factory, model) -> dict[bool, str]:
    """Two datasets of the same chats: in the second, True, other tokens follow each chat's last that counts."""
    folder, random = tmp_path_factory.mktemp("chats"), numpy.random.default_rng(0)
    documents, others, masks = [], [], []
    for number in range(120):
        tokens = random.integers(4, 290, 8 + number % 9)
        mask = numpy.zeros(len(tokens), dtype=bool)
        if number % 7:
            mask[2:4] = mask[5 : len(tokens) - 2] = True
        after = numpy.flatnonzero(mask).max(initial=0) + 1
        documents.append(tokens.tolist())
        others.append([*tokens[:after].tolist(), *((tokens[after:] + 11) % 290).tolist()])
        masks.append(mask.tolist())
    return {
        is_corrupted: write_chats(folder / name, given, masks, model)
        for is_corrupted, name, given in ((False, "clean", documents), (True, "corrupted", others))
    }


def config_of(method: str, model: str, data: str, run: Path) -> Config:
    if method == "opened":
        config = opened_config(model, data, run, "all")
    elif method == "ordinary":
        config = ordinary_config(model, data, run, steps=3)
    elif method == "sheared":
        config = sheared_config(model, data, run)
    else:
        config = make_config(model, data, run, steps=3)
        config.model.method, config.projection.init_method_std = method, 0.05
    config.data.reset_attention_mask = True
    return config


@pytest.mark.parametrize(
    "method, layout",
    [
        ("opened", {"tp": 2}),
        ("ordinary", {"dist_opt": True}),
        pytest.param("opened", {"cp": 2}, marks=pytest.mark.slow),
        pytest.param("ordinary", {"pp": 2}, marks=pytest.mark.slow),
        pytest.param("logits", {"pp": 2}, marks=pytest.mark.slow),
        pytest.param("sheared", {"pp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_runs_do_not_see_what_no_answer_follows(model, chats, tmp_path, method, layout):
    """Training and validation, bit for bit, of documents that are kept apart. Where every token counts, the same change
    is seen."""

    def trained(name: str, data: str, **flags: bool) -> tuple[list[dict], list[dict], dict[str, str]]:
        config = config_of(method, model, data, tmp_path / name)
        config.data.train_on_inputs = flags.get("train_on_inputs", False)
        train(on_layout(config, **layout), ranks=2)
        run = tmp_path / name
        tensors = {key: digest(tensor) for key, tensor in read_tensors(newest_checkpoint(run)).items()}
        return without_times(records(run)), without_times(records(run, "validation.jsonl")), tensors

    clean = trained("clean", chats[False])
    assert clean == trained("corrupted", chats[True])
    if method == "ordinary":
        everything = [trained(f"all-{name}", chats[name], train_on_inputs=True) for name in (False, True)]
        assert everything[0] != everything[1]
        assert everything[0][0] != clean[0] and everything[0][1] != clean[1]


def test_a_run_goes_on_with_the_same_tokens_only(model, chats, tmp_path):
    text = write_dataset(tmp_path / "text", [list(range(100, 140))] * 20)

    def config(name: str, data: str, **flags: bool) -> Config:
        made = config_of("ordinary", model, data, tmp_path / name)
        made.training.train_iters, made.data.train_on_inputs = 1, flags.get("train_on_inputs", False)
        return made

    masked, plain = config("masked", chats[False]), config("plain", text)
    for made, counted in ((masked, "assistant"), (plain, "all")):
        train(made)
        state = json.loads((newest_checkpoint(made.checkpoint.save) / "run.json").read_text())["state"]
        assert state["tokens_that_count"] == counted

    def going_on(started: Config, **data: object) -> Config:
        on = continued(started, steps=2)
        return replace(on, data=replace(on.data, **data)).resolved(1)

    assert check(going_on(masked), 1).state.tokens_that_count == "assistant"
    assert check(going_on(plain, data_path=[chats[False]], train_on_inputs=True), 1).state.tokens_that_count == "all"
    refused = (
        (going_on(masked, train_on_inputs=True), "Leave out --train-on-inputs"),
        (going_on(masked, data_path=[text]), "give data that says which tokens are the assistant's"),
        (going_on(plain, data_path=[chats[False]]), "Go on as before with --train-on-inputs"),
    )
    for other, message in refused:
        with pytest.raises(ConfigError, match="^[^\n]*$") as caught:
            check(other, 1)
        assert message in str(caught.value)
