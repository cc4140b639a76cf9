"""A converted teacher is the Hugging Face teacher, bit for bit: at any layout, in megatron-core, for an export."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from built_stages import build_stages
from hf_teachers import WRITERS
from megatron_lrc.config import Config
from megatron_lrc.hf.checkpoint_reader import CheckpointReader
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.rope import rotations
from megatron_lrc.hf.teacher import TeacherReader
from megatron_lrc.mcore import distributed
from megatron_lrc.mcore.gpt_models import padded_vocab_size, transformer_config
from ranks import run_ranks
from runs import assert_same_parameters, continued, make_config, on_layout, train
from tools_path import convert_from_hf, convert_to_hf

VOCAB = 301
Pairs = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Of each family a Hugging Face directory of 4 layers and what it was converted to; every second one is tied."""
    folder, pairs = tmp_path_factory.mktemp("teachers"), {}
    for number, write in enumerate(WRITERS):
        source, converted = folder / write.__name__, folder / f"{write.__name__}_converted"
        write(source, num_layers=4, is_tied=number % 2 == 1)
        assert convert_from_hf(["--hf-model", str(source), "--output", str(converted)]) == 0
        pairs[write.__name__] = (source, converted)
    return pairs


def differing_parameters(config: Config, pairs: Pairs) -> tuple[int, list[str]]:
    """(parameters compared, names of those that differ) on this rank, read from each of the two forms."""
    groups = distributed.start(config)
    compared, differing = 0, []
    for family, (source, converted) in pairs.items():
        description = describe_teacher(source)
        expected = build_stages(config, description, TeacherReader(description), groups, torch.float32)
        description = describe_teacher(converted)
        found = build_stages(config, description, CheckpointReader(description), groups, torch.float32)
        for chunk, (one, other) in enumerate(zip(expected, found, strict=True)):
            parameters = dict(other.teacher.named_parameters())
            for name, parameter in one.teacher.named_parameters():
                compared += 1
                if not torch.equal(parameter, parameters[name]):
                    differing.append(f"{family}, chunk {chunk}: {name}")
    return compared, differing


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(1, {}), (2, {"tp": 2}), (2, {"pp": 2}), (4, {"tp": 2, "pp": 2}), (2, {"pp": 2, "chunks": 2})],
    ids=["one", "TP2+SP", "PP2", "TP2xPP2", "PP2x2 interleaved"],
)
def test_every_rank_reads_the_same_parameters_from_either_form(teachers, tiny_text, tmp_path, ranks, layout):
    source, _ = next(iter(teachers.values()))
    config = on_layout(make_config(str(source), tiny_text, tmp_path, steps=1), **layout).resolved(ranks)
    results = run_ranks(ranks, differing_parameters, config, teachers)
    assert [differing for _, differing in results] == [[]] * ranks
    assert min(compared for compared, _ in results) > 50


def load_into_plain_model(config: Config, directory: Path) -> GPTModel:
    """A GPTModel of megatron-core's own layers, the checkpoint loaded as megatron-core loads its own."""
    description = describe_teacher(directory)
    shape = description.shape
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.has_qk_norm)
    model = GPTModel(
        config=transformer_config(config, shape, torch.float32, is_trained=False),
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(VOCAB, config.parallel.tensor_model_parallel_size),
        max_sequence_length=16,
        share_embeddings_and_output_weights=shape.is_tied,
        position_embedding_type="rope",
    ).eval()
    model.rotary_pos_emb.inv_freq = rotations(description, 16).full.frequencies
    sharded = {"model": model.sharded_state_dict()}
    loaded, unused, absent = dist_checkpointing.load(sharded, str(directory / "release"), strict="return_all")
    assert not absent and all("_extra_state" in key for key in unused), (absent, unused)
    model.load_state_dict(loaded["model"])
    assert loaded["args"].tensor_model_parallel_size == 1  # Megatron-LM asks for it
    return model


def logits_of_plain_models(config: Config, pairs: Pairs) -> dict[str, torch.Tensor]:
    distributed.start(config)
    tokens = fixed_tokens()
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    positions = torch.arange(16).expand_as(tokens)
    with torch.no_grad():
        return {
            family: load_into_plain_model(config, converted)(tokens, positions, mask)
            for family, (_, converted) in pairs.items()
        }


def fixed_tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))


@pytest.mark.distributed
@pytest.mark.parametrize("tp", [1, 2])
def test_a_plain_megatron_core_model_loads_the_checkpoint_and_computes_what_transformers_does(
    teachers, tiny_text, tmp_path, tp
):
    source, _ = next(iter(teachers.values()))
    config = on_layout(make_config(str(source), tiny_text, tmp_path, steps=1), tp=tp).resolved(tp)
    config.parallel.sequence_parallel = False  # megatron-core's own torch norm refuses it
    parts = run_ranks(tp, logits_of_plain_models, config, teachers)
    for family, (source, _) in teachers.items():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = model(fixed_tokens()).logits
        logits = torch.cat([part[family] for part in parts], dim=-1)[..., :VOCAB]
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max(), family
        assert expected.std() > 0.1


@pytest.mark.distributed
def test_a_run_goes_on_with_the_other_form_of_its_teacher_bit_for_bit(teachers, tiny_text, tmp_path):
    source, converted = (str(path) for path in teachers["write_qwen2"])
    whole = on_layout(make_config(source, tiny_text, tmp_path / "whole", steps=2), tp=2)
    train(whole, 2)
    config = on_layout(make_config(converted, tiny_text, tmp_path / "changed", steps=1), pp=2)
    config = replace(config, parallel=whole.parallel)
    train(config, 2)
    config = continued(config, steps=2)
    train(replace(config, model=replace(config.model, teacher=source)), 2)
    assert_same_parameters(tmp_path / "changed", tmp_path / "whole")


@pytest.mark.distributed
def test_a_student_of_a_converted_teacher_is_exported_alike(teachers, tiny_text, tmp_path):
    source, converted = (str(path) for path in teachers["write_llama_with_biases"])
    train(make_config(converted, tiny_text, tmp_path / "run", steps=1))
    for name, teacher in (("from converted", []), ("from source", ["--teacher", source])):
        assert convert_to_hf(["--load", str(tmp_path / "run"), "--output", str(tmp_path / name), *teacher]) == 0
    assert sorted(os.listdir(tmp_path / "from converted")) == sorted(os.listdir(tmp_path / "from source"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("from converted", "from source"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
