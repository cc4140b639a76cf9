"""An exported student is a plain transformers model, equal by value to what training composes."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from hf_teachers import (
    LLAMA3_ROPE,
    OTHERWISE,
    ROTATED,
    write_gemma3,
    write_llama,
    write_olmo2,
    write_olmo3,
    write_qwen2,
    write_qwen2_with_windows,
    write_qwen3,
)
from megatron_lrc.clone.sites import projection_names
from megatron_lrc.config import ConfigError
from megatron_lrc.hf.families import TeacherDescription, by_tensor, describe_teacher, expected_weights
from megatron_lrc.hf.teacher import TeacherReader
from reference import NORMS_AROUND, NORMS_BEFORE, in_fp64, norm_names
from students import TOKENS, State, export_student, load, logits_of, random_student


def closed_form(model: PreTrainedModel, basis: Tensor) -> State:
    """The closed-form start at d_S = d_T: an orthonormal basis, each norm gain moved into the matrices behind it. Of a
    model with norms behind blocks: all of its own channels."""
    state, hidden = model.state_dict(), basis.shape[0]
    if (kinds := norm_names(model)) is not NORMS_BEFORE:
        names = projection_names(range(2), True, True)
        norms = {
            f"layers.{i}.{ours}": state[f"model.layers.{i}.{name}.weight"]
            for i in (0, 1)
            for name, ours in kinds.items()
        }
        return dict.fromkeys(names, torch.eye(hidden, dtype=basis.dtype)), norms | {"final": state["model.norm.weight"]}

    def behind(norm: str) -> Tensor:
        return state[norm].to(basis.dtype)[:, None] * basis

    projections = {"embed": basis, "lm_head": behind("model.norm.weight")}
    norms = {"final": torch.ones(hidden, dtype=basis.dtype)}
    for layer in range(2):
        for norm, name, sites in (("input", "input", "q k v"), ("post", "post_attention", "gate up")):
            gained = behind(f"model.layers.{layer}.{name}_layernorm.weight")
            projections |= {f"layers.{layer}.{site}": gained for site in sites.split()}
            norms[f"layers.{layer}.{norm}"] = torch.ones(hidden, dtype=basis.dtype)
        projections |= {f"layers.{layer}.o": basis, f"layers.{layer}.down": basis}
    return projections, norms


@pytest.fixture
def teacher(tmp_path: Path) -> TeacherDescription:
    write_llama(tmp_path / "teacher")
    return describe_teacher(tmp_path / "teacher")


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied teacher", "tied teacher"])
@pytest.mark.parametrize(
    ("write", "kind"),
    [(write_llama, "identity"), *((write, "rotation") for write in (write_llama, *OTHERWISE, *ROTATED))],
)
def test_at_full_width_the_student_is_the_teacher(tmp_path: Path, write: Callable, is_tied: bool, kind: str) -> None:
    model = write(tmp_path / "teacher", is_tied=is_tied, dtype=torch.float64)
    basis = torch.eye(48, dtype=torch.float64)
    if kind == "rotation":
        generator = torch.Generator().manual_seed(3)
        basis = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=generator)).Q
    projections, norms = closed_form(model, basis)
    export_student(
        teacher=describe_teacher(tmp_path / "teacher"),
        projections=projections,
        norms=norms,
        student_hidden_size=48,
        output=tmp_path / "student",
    )
    # A rotated state rounds elsewhere: stay in float64, as transformers' norms do not.
    student, expected = (in_fp64(load(tmp_path / name, torch.float64)) for name in ("student", "teacher"))
    assert (logits_of(student) - logits_of(expected)).abs().max() < 1e-9
    assert logits_of(expected).std() > 0.1  # the comparison is of something


@pytest.mark.parametrize("hidden", [28, 30])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_exported_weights_are_the_composed_ones(tmp_path: Path, hidden: int, is_tied: bool) -> None:
    model = write_llama(tmp_path / "teacher", is_tied=is_tied)
    description = describe_teacher(tmp_path / "teacher")
    projections, norms = random_student(description, hidden, has_lm_head=not is_tied)
    output = tmp_path / "student"
    export_student(teacher=description, projections=projections, norms=norms, student_hidden_size=hidden, output=output)
    expected, state = {}, model.state_dict()
    if is_tied:
        del state["lm_head.weight"]  # the embedding's second name
    for name, weight in state.items():
        expected[name] = compose_by_hand(name, weight, projections, norms)
    written = load_file(output / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(written[name], weight), name


#: Writer of a teacher whose student is of the same class -> its frozen tensors.
NATIVE = {write_qwen2: 6, write_qwen3: 4, **dict.fromkeys(OTHERWISE, 0), write_qwen2_with_windows: 6}
NATIVE |= dict.fromkeys((write_olmo2, write_olmo3, write_gemma3), 4)


@pytest.mark.parametrize("hidden", [28, 30])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("write", NATIVE)
def test_a_student_of_its_teachers_class_is_the_one_composed_by_hand(
    tmp_path: Path, write: Callable, is_tied: bool, hidden: int
) -> None:
    """Composed by hand into transformers' own class at the student's width, the logits are those of the export; frozen
    tensors are the teacher's; and what is read of the export, as of a teacher, is what was written."""
    model = write(tmp_path / "teacher", is_tied=is_tied)
    description = describe_teacher(tmp_path / "teacher")
    projections, norms = random_student(description, hidden, has_lm_head=not is_tied)
    output = tmp_path / "student"

    def export() -> None:
        export_student(
            teacher=description,
            projections=projections,
            norms=norms,
            student_hidden_size=hidden,
            output=output,
            arch="native",
        )

    if description.family.has_whole_heads and hidden % description.shape.num_attention_heads:
        with pytest.raises(ConfigError, match="Train with --student-hidden-size 28 or 32"):
            export()
        return
    export()
    student = load(output)
    assert type(student) is type(model)
    assert (student.config.hidden_size, student.config.head_dim) == (hidden, 16)

    config = copy.deepcopy(model.config)
    config.hidden_size = hidden
    expected = type(model)(config).eval()
    with torch.no_grad():
        for name, weight in expected.named_parameters():
            weight.copy_(compose_by_hand(name, model.get_parameter(name), projections, norms))
    assert (logits_of(student) - logits_of(expected)).abs().max() < 1e-5
    assert logits_of(expected).std() > 0.1
    frozen = [
        name for name, _ in model.named_parameters() if name.endswith((".bias", "q_norm.weight", "k_norm.weight"))
    ]
    assert len(frozen) == NATIVE[write]
    written = load_file(output / "model.safetensors")
    assert all(torch.equal(written[name], model.get_parameter(name)) for name in frozen)
    again = describe_teacher(output)
    assert again.shape == replace(description.shape, hidden_size=hidden)
    reader = TeacherReader(again)
    for name, parts in by_tensor(expected_weights(again.family, again.shape)).items():
        assert torch.equal(torch.cat([reader.weight(part) for part in parts]), written[name]), name


#: Rows of the sites in a fused matrix of a tiny teacher.
FUSED = {"qkv_proj": {"q": 64, "k": 32, "v": 32}, "gate_up_proj": {"gate": 80, "up": 80}}


def compose_by_hand(name: str, weight: Tensor, projections: dict[str, Tensor], norms: dict[str, Tensor]) -> Tensor:
    """The student's tensor of this Hugging Face name, from the teacher's."""
    parts = name.split(".")
    layer = f"layers.{parts[2]}." if parts[1] == "layers" else ""
    if name.endswith((".bias", "q_norm.weight", "k_norm.weight")):
        return weight
    if "norm" in name:
        has_norms_after = "layers.0.after_mlp" in norms
        return norms["final" if not layer else layer + (NORMS_AROUND if has_norms_after else NORMS_BEFORE)[parts[-2]]]
    if parts[-2] in FUSED:
        sites = FUSED[parts[-2]]
        pieces = weight.split(list(sites.values()))
        return torch.cat([piece @ projections[layer + site] for site, piece in zip(sites, pieces, strict=True)])
    projection = projections[layer + parts[-2].removesuffix("_proj").replace("embed_tokens", "embed")]
    return projection.T @ weight if parts[-2] in ("o_proj", "down_proj") else weight @ projection


@pytest.mark.parametrize("hidden", [28, 30])
def test_student_of_any_width_loads_generates_and_keeps_the_config(
    tmp_path: Path, teacher: TeacherDescription, hidden: int
) -> None:
    """transformers refuses a Llama whose hidden size its heads do not divide: 30 is written as Mistral."""
    projections, norms = random_student(teacher, hidden, has_lm_head=True)
    output = tmp_path / "student"
    export_student(
        teacher=teacher,
        projections=projections,
        norms=norms,
        student_hidden_size=hidden,
        output=output,
        model_card="# A card\n",
    )
    model, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    config = model.config
    assert type(model).__name__ == {28: "LlamaForCausalLM", 30: "MistralForCausalLM"}[hidden]
    assert (config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads) == (
        hidden,
        16,
        4,
        2,
    )
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.max_position_embeddings) == (3e-5, False, 256)
    assert config.rope_parameters == LLAMA3_ROPE
    assert getattr(config, "sliding_window", None) is None
    assert torch.equal(model.model.rotary_emb.inv_freq, LlamaForCausalLM(teacher.hf_config).model.rotary_emb.inv_freq)
    generated = model.generate(TOKENS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generated.shape == (2, 28)
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (output, teacher.directory)]
    assert tokenizers[0]("a cloned model")["input_ids"] == tokenizers[1]("a cloned model")["input_ids"]
    assert (output / "generation_config.json").is_file()
    assert (output / "README.md").read_text() == "# A card\n"


def test_shards_hold_what_the_single_file_holds(tmp_path: Path, teacher: TeacherDescription) -> None:
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    for name, size in (("single", 10**9), ("sharded", 30_000)):
        export_student(
            teacher=teacher,
            projections=projections,
            norms=norms,
            student_hidden_size=28,
            output=tmp_path / name,
            max_shard_size=size,
        )
    shards = sorted((tmp_path / "sharded").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    single = load_file(tmp_path / "single" / "model.safetensors")
    sharded = {name: (tensor, shard.name) for shard in shards for name, tensor in load_file(shard).items()}
    assert index["weight_map"] == {name: shard for name, (_, shard) in sharded.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in single.values())
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], tensor) for name, (tensor, _) in sharded.items())
    assert torch.equal(logits_of(load(tmp_path / "single")), logits_of(load(tmp_path / "sharded")))


@pytest.mark.parametrize("has_lm_head", [False, True], ids=["tied", "untied"])
def test_saved_projections_have_the_agreed_names_and_values(tmp_path: Path, has_lm_head: bool) -> None:
    write_llama(tmp_path / "teacher", is_tied=True)
    description = describe_teacher(tmp_path / "teacher")
    projections, norms = random_student(description, 28, has_lm_head=has_lm_head, dtype=torch.bfloat16)
    output = tmp_path / "student"
    export_student(
        teacher=description,
        projections=projections,
        norms=norms,
        student_hidden_size=28,
        output=output,
        dtype=torch.float32,
        save_projections=True,
    )
    written = load_file(output / "projections.safetensors")
    expected = projections | {f"norms.{name}": gain for name, gain in norms.items()}
    assert written.keys() == expected.keys() and ("lm_head" in written) == has_lm_head
    assert all(
        torch.equal(written[name], tensor) and written[name].dtype == torch.bfloat16
        for name, tensor in expected.items()
    )
    model = load(output)
    assert model.config.tie_word_embeddings == (not has_lm_head)
    weight = load_file(tmp_path / "teacher/model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    composed = weight.bfloat16() @ projections["layers.1.up"]  # bf16 training composes in bf16, whatever --dtype says
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, composed.float())
