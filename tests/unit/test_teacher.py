"""A teacher's tensors reach megatron-core's fused weights slice by slice; damaged files are refused before that."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_teachers import write_llama, write_llama_with_biases, write_qwen2, write_qwen3
from megatron_lrc.clone.sites import EMBED, LAYER_SITES, LM_HEAD, HeadLayout, select
from megatron_lrc.config import ConfigError
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.teacher import TeacherReader, files_of_tensors

HEADS = HeadLayout(head_dim=16, queries_per_group=2)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    directory = tmp_path_factory.mktemp("untied")
    return directory, write_llama(directory).state_dict()


@pytest.fixture
def damaged(untied: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(untied[0], tmp_path / "teacher"))


def open_teacher(directory: Path) -> TeacherReader:
    return TeacherReader(describe_teacher(directory))


def rewrite(directory: Path, tensors: dict[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of the single file."""
    content = load_file(directory / "model.safetensors") | tensors
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, directory / "model.safetensors")


def refusal(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        open_teacher(directory)
    message = str(caught.value)
    assert "\n" not in message
    return message


def fuse_by_hand(state: dict[str, Tensor], layer: int, *, rank: int, size: int) -> dict[str, Tensor]:
    """megatron-core's four weights on one rank: per KV group its queries, key and value; gate, then up."""
    base = f"model.layers.{layer}."
    q, k, v, o = (state[f"{base}self_attn.{name}_proj.weight"] for name in "qkvo")
    rows = []
    for group in range(2)[rank * 2 // size : (rank + 1) * 2 // size]:
        rows += [q[group * 32 : group * 32 + 32], k[group * 16 : group * 16 + 16], v[group * 16 : group * 16 + 16]]
    gate, up, down = (state[f"{base}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return {
        "self_attention.linear_qkv": torch.cat(rows),
        "self_attention.linear_proj": o.chunk(size, dim=1)[rank],
        "mlp.linear_fc1": torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]]),
        "mlp.linear_fc2": down.chunk(size, dim=1)[rank],
    }


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_sites_fill_the_fused_weights_of_megatron_core(untied: tuple[Path, dict], rank: int, size: int) -> None:
    directory, state = untied
    reader = open_teacher(directory)
    for layer in range(2):
        expected = fuse_by_hand(state, layer, rank=rank, size=size)
        fused = {name: torch.full_like(weight, float("nan")) for name, weight in expected.items()}
        for site in LAYER_SITES:
            target = select(site, fused[site.linear], HEADS)
            target.copy_(reader.site(site, layer, tp_rank=rank, tp_size=size).view_as(target))
        for name, weight in expected.items():
            assert torch.equal(fused[name], weight), name


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_biases_fill_the_fused_bias_of_megatron_core(tmp_path: Path, rank: int, size: int) -> None:
    state = write_qwen2(tmp_path).state_dict()
    reader = open_teacher(tmp_path)
    for layer in range(2):
        q, k, v = (state[f"model.layers.{layer}.self_attn.{name}_proj.bias"] for name in "qkv")
        rows = []
        for group in range(2)[rank * 2 // size : (rank + 1) * 2 // size]:
            rows += [q[group * 32 : group * 32 + 32], k[group * 16 : group * 16 + 16], v[group * 16 : group * 16 + 16]]
        fused = torch.full((128 // size,), float("nan"))
        for site in LAYER_SITES[:3]:
            target = select(site, fused, HEADS)
            target.copy_(reader.frozen(f"{site.name}_bias", layer, tp_rank=rank, tp_size=size).view_as(target))
        assert torch.equal(fused, torch.cat(rows))


def test_gains_of_q_and_k_norms_are_whole_on_every_rank(tmp_path: Path) -> None:
    state = write_qwen3(tmp_path).state_dict()
    reader = open_teacher(tmp_path)
    for name in ("q_norm", "k_norm"):
        for rank in range(2):
            gain = reader.frozen(name, 1, tp_rank=rank, tp_size=2)
            assert torch.equal(gain, state[f"model.layers.1.self_attn.{name}.weight"])


def test_qwen_without_its_biases_or_norms_is_refused(tmp_path: Path) -> None:
    for write, name in ((write_qwen2, "self_attn.k_proj.bias"), (write_qwen3, "self_attn.k_norm.weight")):
        directory = tmp_path / write.__name__
        write(directory)
        rewrite(directory, {f"model.layers.1.{name}": None})
        assert f"tensor model.layers.1.{name}" in (message := refusal(directory)) and "is missing" in message


def test_vocabulary_rows_are_padded_with_zeros_and_split_over_ranks(untied: tuple[Path, dict]) -> None:
    directory, state = untied
    reader = open_teacher(directory)
    for site, name in ((EMBED, "model.embed_tokens.weight"), (LM_HEAD, "lm_head.weight")):
        parts = [reader.site(site, tp_rank=rank, tp_size=4, padded_vocab_size=512) for rank in range(4)]
        assert [tuple(part.shape) for part in parts] == [(128, 48)] * 4
        assert torch.equal(torch.cat(parts)[:301], state[name])
        assert not torch.cat(parts)[301:].any()
        assert torch.equal(reader.site(site), state[name])


def test_norms_are_read_by_their_name(untied: tuple[Path, dict]) -> None:
    directory, state = untied
    reader = open_teacher(directory)
    assert torch.equal(reader.norm("input", 1), state["model.layers.1.input_layernorm.weight"])
    assert torch.equal(reader.norm("post", 0), state["model.layers.0.post_attention_layernorm.weight"])
    assert torch.equal(reader.norm("final"), state["model.norm.weight"])


def test_sharded_teacher_reads_as_the_single_file(untied: tuple[Path, dict], tmp_path: Path) -> None:
    write_llama(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    single, sharded = open_teacher(untied[0]), open_teacher(tmp_path)
    for name in untied[1]:
        assert torch.equal(single.read(name), sharded.read(name)), name


def test_bf16_teacher_is_read_in_bf16(tmp_path: Path) -> None:
    state = write_llama(tmp_path, dtype=torch.bfloat16).state_dict()
    part = open_teacher(tmp_path).site(LAYER_SITES[0], 0, tp_rank=1, tp_size=2)
    assert torch.equal(part, state["model.layers.0.self_attn.q_proj.weight"][32:])
    assert part.dtype == torch.bfloat16


def test_lm_head_of_a_tied_teacher_is_its_embedding(tmp_path: Path) -> None:
    state = write_llama(tmp_path, is_tied=True).state_dict()
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(open_teacher(tmp_path).site(LM_HEAD), state["model.embed_tokens.weight"])


def test_tied_teacher_may_repeat_its_embedding_but_not_contradict_it(tmp_path: Path) -> None:
    embedding = write_llama(tmp_path, is_tied=True).state_dict()["model.embed_tokens.weight"].clone()
    rewrite(tmp_path, {"lm_head.weight": embedding.clone()})
    open_teacher(tmp_path)
    embedding[300, 47] += 1
    rewrite(tmp_path, {"lm_head.weight": embedding})
    assert "tie_word_embeddings: true, but lm_head.weight" in refusal(tmp_path)


def test_rope_buffers_of_llama_2_files_are_ignored(damaged: Path) -> None:
    rewrite(damaged, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    open_teacher(damaged)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"lm_head.weight": None}, ["lm_head.weight [301, 48] is missing", "tie_word_embeddings: false"]),
        ({"model.norm.weight": None}, ["model.norm.weight [48] is missing"]),
        (
            {"model.norm.weight": torch.zeros(47)},
            ["model.norm.weight in model.safetensors has shape [47], expected [48]"],
        ),
        ({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}, ["dtype I8, expected F64"]),
        (
            {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)},
            ["unexpected tensor model.layers.0.self_attn.q_proj.bias in model.safetensors"],
        ),
        (
            {"model.layers.2.mlp.up_proj.weight": torch.zeros(80, 48)},
            ["unexpected tensor model.layers.2.mlp.up_proj.weight"],
        ),
    ],
    ids=["no lm_head", "missing", "shape", "dtype", "bias", "layer too many"],
)
def test_wrong_tensors_are_refused_by_name(damaged: Path, tensors: dict, words: list[str]) -> None:
    rewrite(damaged, tensors)
    message = refusal(damaged)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_truncated_file_is_refused(damaged: Path, size: int) -> None:
    path = damaged / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:size])
    message = refusal(damaged)
    assert str(path) in message and "not a complete safetensors file" in message


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"model.norm.weight": "absent.safetensors"}}, "names absent.safetensors, which is not there"),
        (
            {"weight_map": {"model.norm.weight": "../outside.safetensors"}},
            "where plain file names beside it are expected",
        ),
        (
            {"weight_map": {"model.norm.weight": "/outside.safetensors"}},
            "where plain file names beside it are expected",
        ),
        ({"weight_map": {"model.norm.weight": "link.safetensors"}}, "outside.safetensors, outside of its folder"),
        ({"weight_map": {"model.norms.weight": "part.safetensors"}}, "which does not hold it"),
        ({"weight_map": {"model.norm.weight": 3}}, "is not a safetensors index"),
        ({"weight_map": {}}, "is not a safetensors index"),
        ([], "is not a safetensors index"),
    ],
    ids=["absent", "parent", "absolute", "link", "other tensor", "no name", "empty", "list"],
)
def test_bad_index_is_refused(damaged: Path, index: object, words: str) -> None:
    shutil.copy(damaged / "model.safetensors", damaged.parent / "outside.safetensors")
    (damaged / "link.safetensors").symlink_to(damaged.parent / "outside.safetensors")
    (damaged / "model.safetensors").rename(damaged / "part.safetensors")
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    assert words in refusal(damaged)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("text", "words"),
    [("[" * 100_000, "it is nested too deeply"), ("\ufeff{}", "it begins with a UTF-8 byte order mark; save it as")],
    ids=["nested", "marked"],
)
def test_json_that_is_nested_or_marked_is_refused_by_what_is_wrong(
    damaged: Path, name: str, text: str, words: str
) -> None:
    (damaged / name).write_text(text, encoding="utf-8")
    assert words in (message := refusal(damaged)) and name in message


def write_two_shards(directory: Path, *, twice: str | None = None, index_says: int = 1) -> None:
    """Cut the single file in two. twice: a tensor that both are to hold, negated in the second."""
    tensors = load_file(directory / "model.safetensors")
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    names = sorted(tensors)
    file_of = {name: files[number % 2] for number, name in enumerate(names)}
    shards = [{name: tensors[name] for name in names if file_of[name] == file} for file in files]
    if twice:
        shards[0][twice], shards[1][twice] = tensors[twice], -tensors[twice]
        file_of[twice] = files[index_says]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, directory / file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))


@pytest.mark.parametrize("index_says", [0, 1])
def test_a_tensor_in_two_files_is_refused_whatever_the_index_says(damaged: Path, index_says: int) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    write_two_shards(damaged, twice=name, index_says=index_says)
    words = f"holds tensor {name} twice, in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors"
    assert words in refusal(damaged)
    with pytest.raises(ConfigError, match=words):
        files_of_tensors(damaged)


def test_an_index_can_change_nothing(damaged: Path) -> None:
    """It may leave a tensor out, and places none where it is not."""
    write_two_shards(damaged)
    path, before = damaged / "model.safetensors.index.json", open_teacher(damaged)
    weight_map = json.loads(path.read_text())["weight_map"]
    left_out, moved, *_ = weight_map
    del weight_map[left_out]
    path.write_text(json.dumps({"weight_map": weight_map}))
    assert open_teacher(damaged).fingerprint() == before.fingerprint()
    assert torch.equal(open_teacher(damaged).read(left_out), before.read(left_out))
    weight_map[moved] = next(file for file in weight_map.values() if file != weight_map[moved])
    path.write_text(json.dumps({"weight_map": weight_map}))
    assert f"places {moved} in" in refusal(damaged)


def test_fingerprint_follows_the_content_and_not_the_place(untied: tuple[Path, dict], damaged: Path) -> None:
    original = open_teacher(untied[0]).fingerprint()
    assert open_teacher(damaged).fingerprint() == original
    path = damaged / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a fine-tuned model: same names, shapes and sizes
    assert open_teacher(damaged).fingerprint() != original


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
)
def test_values_that_are_not_finite_are_refused_by_name_when_they_are_read(damaged: Path, name: str) -> None:
    tensor = load_file(damaged / "model.safetensors")[name]
    tensor.view(-1)[-1] = float("nan")
    rewrite(damaged, {name: tensor})
    reader = open_teacher(damaged)
    with pytest.raises(ConfigError, match=rf"tensor {name} in model.safetensors holds values that are not finite"):
        if "layers" in name:
            reader.site(LAYER_SITES[-1], 1, tp_rank=1, tp_size=2)
        elif "norm" in name:
            reader.norm("final")
        else:
            reader.site(EMBED, tp_rank=1, tp_size=2, padded_vocab_size=384)


def test_a_bias_of_o_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    model = write_llama_with_biases(tmp_path)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.bias[3] = 1e-3
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"layers.1.self_attn.o_proj.bias in model.safetensors is not all zero"):
        TeacherReader(describe_teacher(tmp_path))
