"""An exported student is a plain transformers model, equal by value to what training composes; or nothing at all."""

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
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_teachers import LLAMA3_ROPE, write_llama, write_llama_with_biases, write_mistral, write_qwen2, write_qwen3
from megatron_lrc.clone.sites import projection_names
from megatron_lrc.config import ConfigError
from megatron_lrc.hf.architectures import LLAMA_WITH_BIASES, MISTRAL
from megatron_lrc.hf.export import export_student
from megatron_lrc.hf.families import TeacherDescription, describe_teacher
from megatron_lrc.hf.safetensors_writer import parse_size, plan_shards
from megatron_lrc.hf.student_config import Arch, model_card, student_config, student_family
from megatron_lrc.hf.teacher import TeacherReader

TOKENS = torch.arange(3, 51).view(2, 24) * 5 % 301

State = tuple[dict[str, Tensor], dict[str, Tensor]]


def random_student(description: TeacherDescription, hidden: int, *, has_lm_head: bool, dtype=torch.float32) -> State:
    """Projections and norm gains of a student that has been trained a little."""
    generator = torch.Generator().manual_seed(11)
    layers = range(description.shape.num_layers)
    size = (description.shape.hidden_size, hidden)
    names = projection_names(layers, True, has_lm_head)
    projections = {name: (torch.randn(size, generator=generator) * 0.2).to(dtype) for name in names}
    gains = [f"layers.{layer}.{norm}" for layer in layers for norm in ("input", "post")] + ["final"]
    norms = {name: (1 + 0.1 * torch.randn(hidden, generator=generator)).to(dtype) for name in gains}
    return projections, norms


def closed_form(model: LlamaForCausalLM, basis: Tensor) -> State:
    """The closed-form start at d_S = d_T: an orthonormal basis, each norm gain moved into the matrices behind it."""
    state, hidden = model.state_dict(), basis.shape[0]

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


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture
def teacher(tmp_path: Path) -> TeacherDescription:
    write_llama(tmp_path / "teacher")
    return describe_teacher(tmp_path / "teacher")


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied teacher", "tied teacher"])
@pytest.mark.parametrize("kind", ["identity", "rotation"])
def test_at_full_width_the_student_is_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_tied: bool, kind: str
) -> None:
    model = write_llama(tmp_path / "teacher", is_tied=is_tied, dtype=torch.float64)
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

    def forward(norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
        return norm.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

    # transformers rounds the normalised state to float32, and a rotated state rounds elsewhere: stay in float64.
    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    student, expected = load(tmp_path / "student", torch.float64), load(tmp_path / "teacher", torch.float64)
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


@pytest.mark.parametrize("hidden", [28, 30])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("write", [write_qwen2, write_qwen3])
def test_qwen_student_has_its_teachers_frozen_tensors(
    tmp_path: Path, write: Callable, is_tied: bool, hidden: int
) -> None:
    """Composed by hand into transformers' own class at the student's width, the logits are those of the export."""
    model = write(tmp_path / "teacher", is_tied=is_tied)
    description = describe_teacher(tmp_path / "teacher")
    projections, norms = random_student(description, hidden, has_lm_head=not is_tied)
    output = tmp_path / "student"
    export_student(
        teacher=description,
        projections=projections,
        norms=norms,
        student_hidden_size=hidden,
        output=output,
        arch="native",
    )
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
    assert len(frozen) == {write_qwen2: 6, write_qwen3: 4}[write]
    written = load_file(output / "model.safetensors")
    assert all(torch.equal(written[name], model.get_parameter(name)) for name in frozen)


def test_student_of_a_qwen2_that_leaves_head_dim_out_keeps_its_heads(tmp_path: Path) -> None:
    """As published Qwen2 configs do: by itself, transformers would take the student's hidden size over the heads."""
    write_qwen2(tmp_path / "teacher", head_dim=None)
    description = describe_teacher(tmp_path / "teacher")
    assert "head_dim" not in description.config_values
    projections, norms = random_student(description, 20, has_lm_head=True)
    output = tmp_path / "student"
    export_student(teacher=description, projections=projections, norms=norms, student_hidden_size=20, output=output)
    attention = load(output).model.layers[1].self_attn
    assert attention.head_dim == 12 and attention.q_proj.weight.shape == (48, 20)


def test_a_narrower_qwen2_is_written_as_llama_with_biases_and_computes_the_same(tmp_path: Path) -> None:
    """For servers that take the size of a Qwen2 head to be hidden size / heads."""
    write_qwen2(tmp_path / "teacher")
    description = describe_teacher(tmp_path / "teacher")
    projections, norms = random_student(description, 28, has_lm_head=True)
    for arch in ("auto", "native"):
        output = tmp_path / arch
        export_student(
            teacher=description,
            projections=projections,
            norms=norms,
            student_hidden_size=28,
            output=output,
            arch=arch,  # type: ignore[arg-type]
        )
    as_llama, as_qwen2 = load(tmp_path / "auto"), load(tmp_path / "native")
    assert type(as_llama).__name__ == "LlamaForCausalLM" and type(as_qwen2).__name__ == "Qwen2ForCausalLM"
    assert (as_llama.config.head_dim, as_llama.config.attention_bias) == (16, True)
    assert torch.equal(logits_of(as_llama), logits_of(as_qwen2))
    back = describe_teacher(tmp_path / "auto")  # it can be the next teacher
    assert back.family is LLAMA_WITH_BIASES and back.shape == replace(description.shape, hidden_size=28)
    assert TeacherReader(back).frozen("q_bias", 1).equal(TeacherReader(description).frozen("q_bias", 1))


@pytest.mark.parametrize(
    ("write", "hidden", "arch", "architecture"),
    [
        (write_llama, 28, "auto", "LlamaForCausalLM"),
        (write_llama, 30, "auto", "MistralForCausalLM"),
        (write_mistral, 30, "auto", "MistralForCausalLM"),
        (write_mistral, 28, "llama", "LlamaForCausalLM"),
        (write_qwen2, 64, "auto", "Qwen2ForCausalLM"),  # 4 heads of 16
        (write_qwen2, 30, "auto", "Qwen2ForCausalLM"),
        (write_qwen2, 28, "llama", "LlamaForCausalLM"),
        (write_llama_with_biases, 30, "auto", "Qwen2ForCausalLM"),
        (write_llama_with_biases, 28, "auto", "LlamaForCausalLM"),
        (write_qwen3, 30, "auto", "Qwen3ForCausalLM"),
    ],
)
def test_the_class_follows_the_width_and_the_flag(
    tmp_path: Path, write: Callable, hidden: int, arch: Arch, architecture: str
) -> None:
    write(tmp_path)
    assert student_family(describe_teacher(tmp_path), hidden, arch).architecture == architecture


@pytest.mark.parametrize(
    ("write", "hidden", "arch", "words"),
    [
        (write_llama, 30, "native", "no multiple of its heads .4.. Use --arch auto"),
        (write_qwen2, 30, "llama", "no multiple of its heads .4.. Use --arch auto"),
        (write_qwen3, 28, "llama", "no place for what Qwen3ForCausalLM has .k_norm, q_norm.. Use --arch native"),
    ],
)
def test_a_class_that_cannot_hold_the_student_is_refused(
    tmp_path: Path, write: Callable, hidden: int, arch: Arch, words: str
) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match=words):
        student_family(describe_teacher(tmp_path), hidden, arch)


def test_a_bias_of_o_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    model = write_llama_with_biases(tmp_path)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.bias[3] = 1e-3
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"layers.1.self_attn.o_proj.bias in model.safetensors is not all zero"):
        TeacherReader(describe_teacher(tmp_path))


def compose_by_hand(name: str, weight: Tensor, projections: dict[str, Tensor], norms: dict[str, Tensor]) -> Tensor:
    """The student's tensor of this Hugging Face name, from the teacher's."""
    parts = name.split(".")
    layer = f"layers.{parts[2]}." if parts[1] == "layers" else ""
    if name.endswith((".bias", "q_norm.weight", "k_norm.weight")):
        return weight
    if "norm" in name:
        return norms["final" if not layer else layer + ("input" if "input" in name else "post")]
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


def test_mistral_computes_what_llama_computes(tmp_path: Path, teacher: TeacherDescription) -> None:
    """The same weights under both classes give the same logits, RoPE scaling included."""
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    output = tmp_path / "student"
    export_student(teacher=teacher, projections=projections, norms=norms, student_hidden_size=28, output=output)
    as_llama = logits_of(load(output))
    values = json.loads((output / "config.json").read_text())
    values |= {"architectures": [MISTRAL.architecture], "model_type": MISTRAL.model_type, **MISTRAL.config}
    (output / "config.json").write_text(json.dumps(values))
    as_mistral = load(output)
    assert type(as_mistral).__name__ == MISTRAL.architecture
    assert torch.equal(logits_of(as_mistral), as_llama)


def test_config_says_the_same_to_readers_of_either_spelling(tmp_path: Path, teacher: TeacherDescription) -> None:
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    output = tmp_path / "student"
    export_student(teacher=teacher, projections=projections, norms=norms, student_hidden_size=28, output=output)
    values = json.loads((output / "config.json").read_text())
    assert values["rope_parameters"] == {"rope_theta": values["rope_theta"], **values["rope_scaling"]} == LLAMA3_ROPE
    assert values["dtype"] == values["torch_dtype"] == "float32"


@pytest.mark.parametrize("hidden", [28, 30])
def test_nothing_is_left_to_the_defaults_of_a_class(teacher: TeacherDescription, hidden: int) -> None:
    """A Llama 2 config.json leaves out what was Llama's default then; head_dim would follow the new hidden size."""
    implied = ("head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "bos_token_id")
    left = {name: value for name, value in teacher.config_values.items() if name not in implied}
    shape = replace(teacher.shape, hidden_size=hidden)
    family = student_family(teacher, hidden)
    values = student_config(replace(teacher, config_values=left), shape, family, dtype=torch.float32)
    assert values == student_config(teacher, shape, family, dtype=torch.float32)
    assert {name: values[name] for name in implied} == {
        "head_dim": 16,
        "num_key_value_heads": 2,
        "rms_norm_eps": 3e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
    }


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


def test_model_card_names_teacher_width_and_tokens(teacher: TeacherDescription) -> None:
    card = model_card(
        teacher=teacher,
        family=MISTRAL,
        student_hidden_size=30,
        tokens=1_234_567,
        steps=89,
        is_tied=False,
        losses={"lm_loss": 3.25},
        settings=["lr: 0.001"],
    )
    for words in (
        "| lm loss, held out | 3.2500 |",
        "lr: 0.001",
        "Low-Rank Clone",
        "`teacher`",
        "hidden size 30",
        "1,234,567",
        "| 89 |",
        "MistralForCausalLM",
        "untied",
    ):
        assert words in card


def refuse(tmp_path: Path, teacher: TeacherDescription, state: State, **changes: object) -> str:
    """The message of an export that must fail; nothing may be left beside the teacher."""
    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = {"student_hidden_size": 28, "output": tmp_path / "student"} | changes
    with pytest.raises(ConfigError) as caught:
        export_student(teacher=teacher, projections=state[0], norms=state[1], **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_diverged_student_is_not_kept(tmp_path: Path, teacher: TeacherDescription) -> None:
    state = random_student(teacher, 28, has_lm_head=True)
    state[0]["layers.1.down"][3, 3] = float("nan")
    assert "logits are not finite" in refuse(tmp_path, teacher, state)
    export_student(
        teacher=teacher,
        projections=state[0],
        norms=state[1],
        student_hidden_size=28,
        output=tmp_path / "student",
        verify=False,
    )
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_a_student_whose_activations_overflow_float16_is_not_kept_as_one(
    tmp_path: Path, teacher: TeacherDescription
) -> None:
    """Its weights fit into float16, and float32 arithmetic shows nothing."""
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    norms["layers.1.post"] = norms["layers.1.post"] * 3000.0
    message = refuse(tmp_path, teacher, (projections, norms), dtype=torch.float16)
    assert "computed in float16 its logits are not finite" in message


def test_student_of_another_teacher_is_refused(tmp_path: Path, teacher: TeacherDescription) -> None:
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    without = {name: tensor for name, tensor in projections.items() if name != "layers.1.o"}
    assert "projections" in (message := refuse(tmp_path, teacher, (without, norms))) and "layers.1.o" in message
    message = refuse(tmp_path, teacher, (projections, norms | {"layers.2.post": norms["final"]}))
    assert "norm gains" in message and "layers.2.post" in message
    narrow = projections | {"layers.0.v": projections["layers.0.v"][:, :27]}
    message = refuse(tmp_path, teacher, (narrow, norms))
    assert "layers.0.v has shape [48, 27]" in message and "[48, 28] is expected" in message


def test_tied_student_of_an_untied_teacher_is_refused(tmp_path: Path, teacher: TeacherDescription) -> None:
    message = refuse(tmp_path, teacher, random_student(teacher, 28, has_lm_head=False))
    assert "--untie-embeddings-and-output-weights" in message


def test_damaged_teacher_leaves_no_output(tmp_path: Path, teacher: TeacherDescription) -> None:
    path = teacher.directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert "not a complete safetensors file" in refuse(tmp_path, teacher, random_student(teacher, 28, has_lm_head=True))


def test_only_force_replaces_an_earlier_export_and_only_by_a_complete_one(
    tmp_path: Path, teacher: TeacherDescription
) -> None:
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    output = tmp_path / "student"
    output.mkdir()  # empty: nothing to lose
    export_student(teacher=teacher, projections=projections, norms=norms, student_hidden_size=28, output=output)
    first = load_file(output / "model.safetensors")
    (output / "extra.txt").write_text("of the first export")
    assert "--force" in refuse(tmp_path, teacher, (projections, norms))

    broken = projections | {"embed": projections["embed"] * float("nan")}
    refuse(tmp_path, teacher, (broken, norms), force=True)
    assert (output / "extra.txt").is_file()
    assert torch.equal(load_file(output / "model.safetensors")["lm_head.weight"], first["lm_head.weight"])

    doubled = projections | {"lm_head": projections["lm_head"] * 2}
    export_student(teacher=teacher, projections=doubled, norms=norms, student_hidden_size=28, output=output, force=True)
    assert not (output / "extra.txt").exists()
    assert torch.equal(load_file(output / "model.safetensors")["lm_head.weight"], first["lm_head.weight"] * 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


def test_force_never_replaces_what_is_no_export(tmp_path: Path, teacher: TeacherDescription) -> None:
    state = random_student(teacher, 28, has_lm_head=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    for output in (tmp_path / "run", teacher.directory, tmp_path):
        assert "--force does not replace it" in refuse(tmp_path, teacher, state, output=output, force=True)
    (tmp_path / "file").write_text("")
    assert "is a file" in refuse(tmp_path, teacher, state, output=tmp_path / "file", force=True)


def test_shards_are_cut_in_order_and_a_large_tensor_stands_alone() -> None:
    assert plan_shards({"a": 3, "b": 3, "c": 9, "d": 1}, 6) == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("300 mb", 3 * 10**8), ("64KB", 64_000), ("12", 12)])
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "5TB", "-1GB", "1.5GB", ""])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-shard-size"):
        parse_size(text)
