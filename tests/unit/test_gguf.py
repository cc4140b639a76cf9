"""A GGUF file becomes the model that was written into it; what transformers would drop without a word is refused."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from convert_tool import convert, refused_conversion
from hf_teachers import _sizes, _write, write_gemma3, write_llama, write_qwen2
from megatron_lrc.clone.sites import EMBED, LAYER_SITES, LM_HEAD
from megatron_lrc.data.tokenizer_probes import PLAIN_TEXTS, with_special_tokens
from megatron_lrc.data.tokenizers import load_tokenizer
from megatron_lrc.hf.checkpoint_reader import CheckpointReader, open_teacher
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.gguf_tokenizer import RULES as GGUF_RULES
from megatron_lrc.hf.teacher import TeacherReader
from tokenizer_files import llama2_style, write_directory, write_sentencepiece

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from gguf_files import write_gguf  # noqa: E402

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def write_gguf_model(folder: Path, family: str, *, is_tied: bool = False, **extra) -> tuple[Path, dict[str, Tensor]]:
    """(file, state dict of the model written into it); the model's own directory is folder/source."""
    if family == "llama":
        model = write_llama(folder / "source", is_tied=is_tied, rope=DEFAULT_ROPE)
    else:
        model = write_qwen2(folder / "source", is_tied=is_tied, head_dim=None)
    write_gguf(folder / "model.gguf", model, folder / "source", **extra)
    return folder / "model.gguf", model.state_dict()


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gguf_gives_the_model_that_was_written_into_it(tmp_path: Path, family: str, is_tied: bool) -> None:
    source, state = write_gguf_model(tmp_path, family, is_tied=is_tied)
    convert(source, tmp_path / "hf", "--format", "hf")
    convert(source, tmp_path / "torch_dist")
    for name in ("hf", "torch_dist"):
        reader = open_teacher(describe_teacher(tmp_path / name))
        assert isinstance(reader, TeacherReader if name == "hf" else CheckpointReader)
        for site, module in zip(LAYER_SITES, ("q", "k", "v", "o"), strict=False):
            expected = state[f"model.layers.1.self_attn.{module}_proj.weight"]
            tolerance = 0.02 if site.name == "o" and family == "llama" else 0.0  # 8 bits
            torch.testing.assert_close(reader.site(site, 1), expected, rtol=0, atol=tolerance)
        assert torch.equal(reader.site(LM_HEAD), state["lm_head.weight"])
        assert torch.equal(reader.norm("post", 1), state["model.layers.1.post_attention_layernorm.weight"])
        if family == "qwen2":
            assert torch.equal(reader.frozen("k_bias", 0), state["model.layers.0.self_attn.k_proj.bias"])
        assert reader.description.config_values["rms_norm_eps"] == 3e-5
    one, other = (open_teacher(describe_teacher(tmp_path / name)) for name in ("hf", "torch_dist"))
    assert one.fingerprint() == other.fingerprint()
    text = "a small language model"
    tokens = [AutoTokenizer.from_pretrained(tmp_path / name)(text)["input_ids"] for name in ("hf", "source")]
    assert tokens[0] == tokens[1]


@pytest.fixture
def gemma3(tmp_path: Path) -> tuple[Path, Gemma3ForCausalLM]:
    """(GGUF file, model) of a tiny Gemma 3, heads as large as those of most real ones: what GGUF files do not say is
    transformers' default then."""
    sizes = _sizes(num_layers=6, is_tied=True, vocab_size=600) | {"head_dim": 256, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "rope_parameters": None, "sliding_window": 5, "pad_token_id": None}
    model = _write(tmp_path / "source", Gemma3ForCausalLM, Gemma3TextConfig(**sizes), dtype=torch.float32)
    pieces = write_sentencepiece(tmp_path / "pieces.model")
    write_gguf(tmp_path / "model.gguf", model, pieces)
    return tmp_path / "model.gguf", model


def test_gguf_gives_the_gemma_that_was_written_into_it(gemma3, tmp_path: Path) -> None:
    source, model = gemma3
    convert(source, tmp_path / "hf", "--format", "hf")
    found = Gemma3ForCausalLM.from_pretrained(tmp_path / "hf")
    assert found.config.layer_types == model.config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert found.config.rope_parameters == model.config.rope_parameters
    tokens = torch.arange(40).view(2, 20) * 7 % 600
    with torch.no_grad():
        for of_source, layer in zip(model.model.layers, found.model.layers, strict=True):  # o is stored in 8 bits
            kept = layer.self_attn.o_proj.weight
            assert 0 < (of_source.self_attn.o_proj.weight - kept).abs().max() < 0.02
            of_source.self_attn.o_proj.weight.copy_(kept)
        assert (found(tokens).logits - model(tokens).logits).abs().max() < 1e-4
    convert(tmp_path / "hf", tmp_path / "torch_dist")


def test_gguf_whose_scale_of_scores_is_not_read_is_refused(tmp_path: Path, capsys) -> None:
    """That of the largest Gemmas: no field of theirs says it."""
    write_gemma3(tmp_path / "source")
    model = Gemma3ForCausalLM.from_pretrained(tmp_path / "source")
    write_gguf(tmp_path / "model.gguf", model, write_sentencepiece(tmp_path / "pieces.model"))
    message = refused_conversion(capsys, tmp_path / "model.gguf", tmp_path / "hf", "--format", "hf")
    assert "does not read what its attention scores are divided by (it takes the root of 256)" in message


def test_gguf_can_be_stored_in_another_dtype(tmp_path: Path) -> None:
    source, state = write_gguf_model(tmp_path, "llama")
    convert(source, tmp_path / "hf", "--format", "hf", "--dtype", "bfloat16")
    reader = open_teacher(describe_teacher(tmp_path / "hf"))
    assert torch.equal(reader.site(EMBED), state["model.embed_tokens.weight"].bfloat16())


def test_gguf_with_scaled_rope_is_refused(tmp_path: Path, capsys) -> None:
    """transformers would leave the scaling out without a word."""
    source, _ = write_gguf_model(tmp_path, "llama", extra_fields={"rope.scaling.type": "yarn"})
    assert "does not read its RoPE scaling" in refused_conversion(capsys, source, tmp_path / "output")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope.dimension_count": 8}, "that 8 features of a head are rotated"),
        ({"rope.freq_base_swa": 10000}, "the RoPE base of its layers with sliding windows"),
    ],
)
def test_gguf_whose_rotation_is_not_read_is_refused(tmp_path: Path, capsys, fields: dict, words: str) -> None:
    source, _ = write_gguf_model(tmp_path, "qwen2", extra_fields=fields)
    assert f"does not read {words}" in refused_conversion(capsys, source, tmp_path / "output")


@pytest.mark.parametrize(
    ("family", "key_length", "is_right"), [("llama", 32, False), ("llama", 16, True), ("qwen2", 12, True)]
)
def test_gguf_whose_heads_have_another_size_is_refused(tmp_path: Path, capsys, family, key_length, is_right) -> None:
    """transformers takes it from another field, or from its own default."""
    source, _ = write_gguf_model(tmp_path, family, extra_fields={"attention.key_length": key_length})
    if is_right:
        convert(source, tmp_path / "output")
    else:
        assert f"its head size, {key_length}," in refused_conversion(capsys, source, tmp_path / "output")


def test_gguf_whose_sliding_window_is_not_read_is_refused(tmp_path: Path, capsys) -> None:
    """transformers has no such field of a Qwen2."""
    source, _ = write_gguf_model(tmp_path, "qwen2", extra_fields={"attention.sliding_window": 8})
    assert "its sliding window (8)" in refused_conversion(capsys, source, tmp_path / "output")


def test_gguf_of_an_architecture_that_cannot_be_a_teacher_is_refused(tmp_path: Path, capsys) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "starcoder2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    message = refused_conversion(capsys, tmp_path / "model.gguf", tmp_path / "output")
    assert (
        "holds a starcoder2 model" in message
        and "Supported: gemma2, gemma3, granite, llama, mistral, olmo2, " in message
    )


def test_gguf_with_tensors_that_the_class_has_not_is_refused(tmp_path: Path, capsys) -> None:
    """transformers leaves out the biases of a Llama without a word."""
    source, _ = write_gguf_model(tmp_path, "llama", extra_tensors={"blk.0.attn_q.bias": torch.ones(64)})
    message = refused_conversion(capsys, source, tmp_path / "output")
    assert "some of its tensors (22 in the file, 21 in LlamaForCausalLM)" in message


@pytest.mark.parametrize("size", [0, 3, 2000, -1])
def test_truncated_gguf_is_refused(tmp_path: Path, capsys, size: int) -> None:
    source, _ = write_gguf_model(tmp_path, "llama")
    source.write_bytes(source.read_bytes()[:size])
    assert f"{source}: transformers cannot read this GGUF file" in refused_conversion(capsys, source, tmp_path / "out")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (8, 2**62, "a tensor has impossible sizes"),  # the zeros behind the last one
        (16, 2**62, "its header is longer than the file"),
        (b"tokenizer.ggml.tokens", 2**62, "its header is longer than the file"),
        (b"llama.block_count", 10**9, "llama.block_count is 1000000000, and its tensors have another size"),
    ],
    ids=["tensors", "fields", "tokens", "layers"],
)
def test_gguf_that_claims_more_than_it_has_is_refused_at_once(tmp_path: Path, capsys, place, value, words) -> None:
    """The package gguf would go on reading behind the file's end, transformers would make the layers."""
    source, _ = write_gguf_model(tmp_path, "llama")
    content = bytearray(source.read_bytes())
    if isinstance(place, bytes):  # a name, the type of its value; of an array, that of its elements
        place = content.index(place) + len(place) + (8 if b"tokens" in place else 4)
    size = 4 if value < 2**32 else 8
    content[place : place + size] = value.to_bytes(size, "little")
    source.write_bytes(content)
    message = refused_conversion(capsys, source, tmp_path / "output")
    assert f"{source}: transformers cannot read this GGUF file" in message and words in message


def test_absent_models_are_refused(tmp_path: Path, capsys) -> None:
    assert "No such file" in refused_conversion(capsys, tmp_path / "absent.gguf", tmp_path / "output")
    assert f"--hf-model {tmp_path / 'absent'} does not exist" in refused_conversion(
        capsys, tmp_path / "absent", tmp_path / "output"
    )


def test_missing_gguf_package_is_named(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    message = refused_conversion(capsys, tmp_path / "model.gguf", tmp_path / "output")
    assert "reading GGUF needs gguf, not installed here. Run: pip install gguf" in message


def converted(source: Path, output: Path) -> Tokenizer:
    convert(source, output, "--format", "hf")
    return load_tokenizer(str(output))


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "tekken"])
def test_gguf_tokenizer_has_the_rules_that_its_file_names(tmp_path: Path, pre: str) -> None:
    """Each against a tokenizer.json with these rules, trained by them; transformers has some of them only."""
    source, _ = write_gguf_model(tmp_path, "llama", pre=pre)
    original = Tokenizer.from_file(str(tmp_path / "source" / "tokenizer.json"))
    GGUF_RULES[pre].apply_to(original)
    texts = [*PLAIN_TEXTS, *with_special_tokens(["<s>", "</s>"])]
    found = converted(source, tmp_path / "output").encode_batch(texts)
    assert found == [encoding.ids for encoding in original.encode_batch(texts, add_special_tokens=False)]
    assert AutoTokenizer.from_pretrained(tmp_path / "output")(texts, add_special_tokens=False)["input_ids"] == found


def test_gguf_rules_are_those_that_text_shows() -> None:
    """What the names mean, on text: digits together, apart, in threes; composed; a whole piece first."""

    def pieces(pre: str, text: str) -> list[str]:
        backend = Tokenizer(models.BPE())
        GGUF_RULES[pre].apply_to(backend)
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    assert pieces("gpt-2", "in 20234") == ["in", "\u012020234"]
    assert pieces("smollm", "in 20234") == ["in", "\u0120", "2", "0", "2", "3", "4"]
    assert pieces("llama-bpe", "in 20234") == ["in", "\u0120", "202", "34"]
    assert pieces("qwen2", "in 20234") == ["in", "\u0120", "2", "0", "2", "3", "4"]
    assert pieces("tekken", "HelloWorld") == ["Hello", "World"]
    assert pieces("qwen2", "e\u0301") == pieces("llama-bpe", "\u00e9") != pieces("llama-bpe", "e\u0301")
    assert [pre for pre, rules in sorted(GGUF_RULES.items()) if rules.whole_first] == [
        *("falcon3", "llama-bpe", "llama-v3", "llama3", "tekken")
    ]


@pytest.mark.parametrize(("pre", "said"), [(None, "names none"), ("some-new-bpe", "names 'some-new-bpe'")])
def test_gguf_whose_rules_for_text_are_not_known_is_refused(tmp_path: Path, capsys, pre, said: str) -> None:
    source, _ = write_gguf_model(tmp_path, "llama", pre=pre)
    message = refused_conversion(capsys, source, tmp_path / "output")
    assert str(source) in message and said in message and "llama-bpe" in message


def test_gguf_beside_another_models_files_has_its_own_tokenizer(tmp_path: Path) -> None:
    source, _ = write_gguf_model(tmp_path, "llama")
    alone = converted(source, tmp_path / "alone")
    together = write_directory(tmp_path / "both", llama2_style(), label="LlamaTokenizer", model_type="llama")
    shutil.copy(source, together / "model.gguf")
    assert converted(together / "model.gguf", tmp_path / "output").fingerprint == alone.fingerprint


def test_gguf_of_a_sentencepiece_model_gives_the_ids_of_that_model(tmp_path: Path) -> None:
    model = write_sentencepiece(tmp_path / "pieces")
    pieces = SentencePieceProcessor(model_file=str(model))
    llama = write_llama(tmp_path / "source", vocab_size=pieces.get_piece_size(), rope=DEFAULT_ROPE)
    write_gguf(tmp_path / "model.gguf", llama, model)
    found = converted(tmp_path / "model.gguf", tmp_path / "output")
    texts = [*PLAIN_TEXTS, " the cat", "    def f"]
    assert found.encode_batch(texts) == [pieces.encode(text) for text in texts]
    assert (found.bos, found.eod) == (pieces.bos_id(), pieces.eos_id())


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path, capsys) -> None:
    model = write_llama(tmp_path / "source", rope=DEFAULT_ROPE)
    with torch.no_grad():
        model.model.norm.weight[3] = 70000.0
    write_gguf(tmp_path / "model.gguf", model, tmp_path / "source")
    flags = ("--format", "hf", "--dtype", "float16")
    message = refused_conversion(capsys, tmp_path / "model.gguf", tmp_path / "output", *flags)
    assert "model.norm.weight has values of up to 70000, and --dtype float16 holds 65504 at most" in message
