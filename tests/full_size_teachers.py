"""Teachers of the published runs and the demo's, full in size but of no weight: their safetensors file is sparse.

config.json and the file's header are what the real ones say; the values, all zero, take no disk space.
"""

import hashlib
import json
import math
import time
from pathlib import Path

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from hf_teachers import write_tokenizer
from megatron_lrc.estimate.published_teachers import TEACHER_SHAPES
from megatron_lrc.hf.constant_tensors import Piece, spans_of
from megatron_lrc.hf.content_hash import CHUNK_BYTES, Chunk, FileContents, assemble, hash_chunks, plan
from megatron_lrc.hf.families import describe_teacher, expected_weights
from megatron_lrc.hf.hash_cache import FileState, write_cache

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _config(name: str) -> PretrainedConfig:
    if name == "Llama-3.2-3B-Instruct":
        sizes = _sizes(3072, 28, 24, 8, 8192, 128256, 131072, is_tied=True)
        return LlamaConfig(**sizes, head_dim=128, rms_norm_eps=1e-5, rope_parameters=_LLAMA3_ROPE)
    if name == "Qwen2.5-3B-Instruct":
        return Qwen2Config(**_sizes(2048, 36, 16, 2, 11008, 151936, 32768, is_tied=True), rms_norm_eps=1e-6)
    if name == "Qwen2.5-7B-Instruct":
        return Qwen2Config(**_sizes(3584, 28, 28, 4, 18944, 152064, 32768, is_tied=False), rms_norm_eps=1e-6)
    if name == "SmolLM2-135M-Instruct":
        return LlamaConfig(**_sizes(576, 30, 9, 3, 1536, 49152, 8192, is_tied=True), rms_norm_eps=1e-5)
    assert name == "Llama-2-7b-chat"
    return LlamaConfig(**_sizes(4096, 32, 32, 32, 11008, 32000, 4096, is_tied=False), rms_norm_eps=1e-5)


def _sizes(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, positions: int, *, is_tied: bool
) -> dict:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": is_tied,
    }


def write_full_size_teacher(name: str, folder: Path) -> str:
    """The directory of a published run's teacher, with a small tokenizer."""
    folder.mkdir()
    config = _config(name)
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)
    write_tokenizer(folder, vocab_size=301)
    description = describe_teacher(folder, needs_weights=False)
    header, position = {}, 0
    for weight in expected_weights(description.family, description.shape):
        end = position + 2 * math.prod(weight.shape)
        header[weight.name] = {"dtype": "BF16", "shape": weight.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return str(folder)


def write_full_size_teachers(folder: Path) -> None:
    """All of them, and what a start would read of their files (`hash_cache.py`), which are 41 GB of zeros."""
    folder.mkdir()
    for name in (*TEACHER_SHAPES, "SmolLM2-135M-Instruct"):
        write_full_size_teacher(name, folder / name)
    assert sum(file.stat().st_blocks * 512 for file in folder.rglob("*.safetensors")) < 2**20  # sparse
    time.sleep(2.1)  # what is remembered is of files that are no longer written
    for file in folder.rglob("*.safetensors"):
        contents = contents_of_zeros(file)
        write_cache(file.parent, {file: FileState.of(file)}, {file: contents})


def contents_of_zeros(file: Path) -> FileContents:
    """As `content_hash.hash_files` finds them, without reading more than the first chunk, which holds the header."""
    sizes, zeros, spans = {file: file.stat().st_size}, bytes(CHUNK_BYTES), spans_of(file)
    first, *others = plan(sizes)
    sha256 = {length: hashlib.sha256(zeros[:length]).hexdigest() for length in {work.length for work in others}}
    chunks = []
    for work in others:
        lengths = {span.name: min(span.end, work.start + work.length) - max(span.start, work.start) for span in spans}
        pieces = {name: Piece("0000", length) for name, length in lengths.items() if length > 0}
        chunks.append(Chunk(sha256[work.length], pieces))
    return assemble(sizes, [*hash_chunks([first]), *chunks])[file]
