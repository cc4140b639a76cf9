"""--reset-attention-mask and --reset-position-ids: documents packed into a sequence, each as if it were alone.

RoPE is relative, so that with both flags wrong positions would not show: the reference is met with either flag alone.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from built_stages import build_stages
from gradient_cases import (
    VOCAB,
    Layout,
    Sizes,
    Variant,
    clone_gradients,
    compare_with_the_reference,
    global_batch,
    gradient_config,
)
from hf_teachers import write_llama, write_qwen3
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.data.batches import find_documents
from megatron_lrc.data.data_checks import check_data
from megatron_lrc.data.datasets import build_datasets
from megatron_lrc.data.indexing import IndexingOptions, index_documents
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.teacher import TeacherReader
from megatron_lrc.mcore import distributed
from megatron_lrc.methods.lrc.calibration import forward_teacher
from ranks import run_ranks
from reference import in_fp64, positions_in_documents
from runs import make_config, on_layout, records, train
from tiny_data import make_texts, write_dataset, write_jsonl, write_tokenizer

EOD, NEVER = 3, 50
PACKED = Sizes(vocab=10, eod=EOD)  # some 2 documents in a sequence, some of one token
ATTENTION, POSITIONS = Variant(reset_attention=True), Variant(reset_positions=True)
BOTH = Variant(reset_attention=True, reset_positions=True)
LAYOUTS = [
    Layout(micro=8),
    Layout(tp=2),
    Layout(pp=2, recompute="core_attn"),
    Layout(pp=2, chunks=2, recompute="full"),
    Layout(cp=2, recompute="full"),
    pytest.param(Layout(cp=4), marks=pytest.mark.slow),
    pytest.param(Layout(tp=2, cp=2), marks=pytest.mark.slow),
]


@pytest.mark.distributed
@pytest.mark.parametrize("variant", [ATTENTION, POSITIONS], ids=["attention", "positions"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_losses_and_gradients_equal_the_reference(tiny_llama, layout, variant):
    teacher = tiny_llama(num_layers=4, vocab_size=VOCAB, dtype=torch.float64)
    compare_with_the_reference(teacher, layout, variant, tied=False, sizes=PACKED)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [Layout(), Layout(cp=2)], ids=str)
def test_without_an_eod_both_flags_change_no_bit_of_losses_and_gradients(tiny_llama, layout):
    assert not (global_batch(PACKED)["tokens"] == NEVER).any()
    sizes = replace(PACKED, eod=NEVER)
    teacher = tiny_llama(num_layers=4, vocab_size=VOCAB, dtype=torch.float64)
    on, off = (
        run_ranks(
            layout.world, clone_gradients, gradient_config(teacher, layout, untie=True, variant=variant, sizes=sizes)
        )
        for variant in (BOTH, Variant())
    )
    for (values, *gradients), (values_off, *gradients_off) in zip(on, off, strict=True):
        assert all(torch.equal(values[name], values_off[name]) for name in values_off)
        for of_kind, of_kind_off in zip(gradients, gradients_off, strict=True):
            for name, parts in of_kind_off.items():
                assert all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(of_kind[name], parts, strict=True))


def teacher_logits(config: Config, tokens: Tensor) -> Tensor:
    """On one rank, [b, s, v], as calibration runs the teacher."""
    groups = distributed.start(config)
    teacher = describe_teacher(config.model.teacher)
    (stage,) = build_stages(config, teacher, TeacherReader(teacher), groups, torch.float64)
    hidden = []
    stage.teacher.decoder.final_layernorm.register_forward_hook(lambda norm, inputs, output: hidden.append(output))
    positions = positions_in_documents(tokens, EOD)
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones_like(tokens), "position_ids": positions}
    if config.data.reset_attention_mask:
        batch["documents"] = find_documents(positions)
    forward_teacher([stage], iter([batch]), config, num_microbatches=1)
    logits = hidden[0] @ stage.teacher.output_layer.weight.t()
    return logits.transpose(0, 1)[..., : teacher.shape.vocab_size]


@pytest.mark.distributed
@pytest.mark.parametrize("write", [write_llama, write_qwen3])
def test_each_packed_document_has_the_logits_that_it_has_alone(tmp_path, write):
    write(tmp_path, dtype=torch.float64)
    documents = [[5, 6, 7, 8, 9, EOD], [EOD], [11, 12, 13, 5, 6, 7, 8, 9, 20]]
    whole = list(range(30, 46))  # has no end
    tokens = torch.tensor([sum(documents, []), whole])
    layout = Layout(micro=2)

    def logits(variant: Variant) -> Tensor:
        config = gradient_config(str(tmp_path), layout, untie=True, variant=variant)
        return run_ranks(1, teacher_logits, config, tokens)[0]

    packed, alone = logits(BOTH), in_fp64(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64))
    first = 0
    for document in documents:
        expected = alone(torch.tensor([document])).logits[0]
        torch.testing.assert_close(packed[0, first : first + len(document)], expected, rtol=1e-10, atol=1e-10)
        first += len(document)
    plain = logits(Variant())
    assert torch.equal(packed[1], plain[1])
    assert (packed[0, 7:] - plain[0, 7:]).abs().max() > 1e-2


@pytest.fixture
def run(tiny_llama, tmp_path) -> Config:
    """A run of one step over documents that end with an EOD."""
    teacher = tiny_llama()
    return make_config(teacher, index_texts(teacher, tmp_path / "texts", append_eod=True), tmp_path / "run", steps=1)


def index_texts(tokenizer: str, prefix: Path, *, append_eod: bool) -> str:
    """Prefix of a dataset of 80 short documents."""
    options = IndexingOptions(
        input=[write_jsonl(prefix.with_suffix(".jsonl"), make_texts(80))],
        output_prefix=str(prefix),
        tokenizer_model=tokenizer,
        append_eod=append_eod,
    )
    index_documents(options, report=lambda line: None)
    return f"{prefix}_text_document"


@pytest.mark.parametrize("flag", ["reset_attention_mask", "reset_position_ids"])
def test_positions_from_the_data_restart_after_each_eod_and_the_index_maps_stay(run, tmp_path, flag):
    plain, _ = build_datasets(run.resolved(1))
    _, valid = build_datasets(with_flags(run, flag).resolved(1))
    assert len(os.listdir(tmp_path / "cache")) == 1
    assert [sample["position_ids"].tolist() for sample in first(plain, 3)] == [list(range(16))] * 3
    samples = first(valid, 16)
    for sample in samples:
        expected = positions_in_documents(sample["tokens"][None], eod_of(run))
        assert torch.equal(sample["position_ids"][None], expected)
    assert any((sample["position_ids"] == 0).sum() > 1 for sample in samples)


@pytest.mark.parametrize("flag", ["reset_attention_mask", "reset_position_ids"])
def test_the_flags_need_a_tokenizer_with_an_eod(run, tmp_path, flag):
    endless = write_tokenizer(tmp_path / "endless", eos=False)
    run.data.data_path, run.model.teacher = [write_dataset(tmp_path / "ids", [[1] * 500] * 10)], endless
    check_data(run, 320)
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} needs .* token, .* {endless} has no EOS"):
        check_data(with_flags(run, flag), 320)


def test_data_whose_documents_were_written_without_an_eod_are_warned_of(run, tmp_path, caplog):
    run = with_flags(run, "reset_attention_mask")
    check_data(run, 301)
    assert not caplog.text
    run.data.data_path = [index_texts(run.model.teacher, tmp_path / "endless", append_eod=False)]
    check_data(run, 301)
    assert f"{tmp_path}/endless_text_document was written without --append-eod" in caplog.text


@pytest.mark.distributed
def test_validation_scores_each_document_as_the_teacher_does_alone(run):
    run = with_flags(on_layout(run, pp=2), "reset_attention_mask", "reset_position_ids")
    run.projection.init, run.projection.calibration_tokens = "pca", 64
    run.model.untie_embeddings_and_output_weights = True
    train(run, 2)
    _, valid = build_datasets(run.resolved(2))
    alone = AutoModelForCausalLM.from_pretrained(run.model.teacher, dtype=torch.float32).eval()
    losses = []
    for sample in first(valid, run.logging.eval_iters * 8):
        tokens, ends = sample["tokens"], (sample["tokens"] == eod_of(run)).nonzero().flatten() + 1
        logits = torch.cat([alone(part[None]).logits[0] for part in tokens.tensor_split(ends) if len(part)])
        losses.append(F.cross_entropy(logits, sample["labels"]).item())
    found = records(run.checkpoint.save, "validation.jsonl")[0]["teacher_lm_loss"]
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def with_flags(run: Config, *flags: str) -> Config:
    return replace(run, data=replace(run.data, **dict.fromkeys(flags, True)))


def eod_of(run: Config) -> int:
    return AutoTokenizer.from_pretrained(run.model.teacher).eos_token_id


def first(dataset, count: int) -> list[dict[str, Tensor]]:
    return [dataset[index] for index in range(count)]
