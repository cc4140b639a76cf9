"""A GGUF file -> a plain Hugging Face directory, by transformers' own reader.

transformers dequantises while it reads, but refuses to save a model that came from GGUF: the weights are
handed to a fresh model of a clean configuration, without a copy. What it would drop without a word (RoPE
scaling, tensors that its class has no place for, rules of the tokenizer) is refused here.
"""

import importlib
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from megatron_lrc.config import CONVERTED, ConfigError
from megatron_lrc.data.pretrained import load_causal_model
from megatron_lrc.hf.architectures import FAMILIES
from megatron_lrc.hf.exported_tokenizer import find_other_ids, label_tokenizer
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.gguf_header import check_header, check_sizes
from megatron_lrc.hf.gguf_tokenizer import check_gguf_tokenizer, read_gguf_tokenizer
from megatron_lrc.hf.narrowing import narrowed
from megatron_lrc.hf.teacher import TeacherReader

_PACKAGES = ("gguf", "accelerate")


def write_gguf_as_hf(path: Path, directory: Path, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """Write config, weights (float32 unless given) and tokenizer of a GGUF file into a directory; then read it back.

    Gives (tensors, parameters) once each was found equal, bit for bit, to what transformers made of the file.
    """
    source, tokenizer = read_gguf(path)
    dtype = dtype or torch.float32
    for name, tensor in source.state_dict().items():
        narrowed(tensor, dtype, name)  # refuses what would become infinite
    model = saveable(source.to(dtype))
    model.save_pretrained(directory)
    save_gguf_tokenizer(tokenizer, directory, path)
    reader = TeacherReader(describe_teacher(directory, role=CONVERTED))
    names, state, parameters = reader.names(), model.state_dict(), 0
    for name in names:
        written = reader.read(name)
        parameters += written.numel()
        if not torch.equal(written, state[name]):
            raise ConfigError(
                f"{path}: {name} reads back otherwise than it was written. Check the disk, then try again."
            )
    return len(names), parameters


def save_gguf_tokenizer(tokenizer: Any, directory: Path, path: Path) -> None:
    """Write it beside the model's config.json; ConfigError unless transformers reads it back with the same ids."""
    tokenizer.save_pretrained(directory)
    label_tokenizer(tokenizer, None, directory)
    if fault := find_other_ids(directory):
        raise ConfigError(f"{path}: {fault}. Convert the model's original Hugging Face directory.")


def read_gguf(path: Path) -> tuple[Any, Any]:
    """(model in float32, tokenizer) of a GGUF file, as transformers reads them, if it reads all of it."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{path}: reading GGUF needs {' and '.join(missing)}, not installed here. Run: pip install "
            f"{' '.join(missing)}"
        )
    try:
        check_header(path)
        contents = importlib.import_module("gguf").GGUFReader(path)
        check_sizes(contents, _check_architecture(path, contents))
        check_gguf_tokenizer(path, contents)
        with _alone(path) as file:
            tokenizer = read_gguf_tokenizer(file, contents)
            model = load_causal_model(file.parent, gguf_file=file.name, dtype=torch.float32)
    except ConfigError:
        raise
    except Exception as error:  # each part of transformers has errors of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise ConfigError(
            f"{path}: transformers cannot read this GGUF file ({reason}). A complete file of a supported "
            "architecture is expected. Convert the model's original Hugging Face directory."
        ) from error
    _check_nothing_is_lost(path, contents, model)
    return model.eval(), tokenizer


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """The file in a folder of its own: transformers would take the tokenizer of another model beside it."""
    with tempfile.TemporaryDirectory(prefix="megatron_lrc_") as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder) / path.name


def clean_config(config: Any, architecture: str) -> PreTrainedConfig:
    """The same architecture without traces of GGUF, and with the norm epsilon as it was before GGUF's float32."""
    values = config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "unk_token_id"):
        values.pop(name, None)
    values["rms_norm_eps"] = float(f"{config.rms_norm_eps:.6g}")
    values["architectures"] = [architecture]
    return type(config).from_dict(values)


def saveable(source: Any) -> PreTrainedModel:
    """A model that transformers is willing to save, of `source`'s own weights. It has no RoPE tables: not to be run."""
    model_class = type(source)
    with torch.device("meta"):
        model = model_class(clean_config(source.config, model_class.__name__))
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=source.config.bos_token_id,
        eos_token_id=source.config.eos_token_id,
        pad_token_id=source.config.pad_token_id,
    )
    return model.eval()


def _check_architecture(path: Path, contents: Any) -> str:
    """Refuse what cannot be a teacher before it is dequantised. The name of its architecture."""
    architecture = contents.fields["general.architecture"].contents()
    supported = {one.gguf or one.model_type for one in FAMILIES if not one.fused}
    if architecture not in supported:
        raise ConfigError(
            f"{path} holds a {architecture} model. Supported: {', '.join(sorted(supported))}. Choose another teacher."
        )
    return architecture


def _check_nothing_is_lost(path: Path, contents: Any, model: Any) -> None:
    """transformers ignores RoPE scaling and every tensor that it has no name for, and invents tensors it misses."""
    architecture = contents.fields["general.architecture"].contents()
    rope = {
        name: field.contents()
        for name in ("scaling.type", "dimension_count", "freq_base_swa")
        if (field := contents.fields.get(f"{architecture}.rope.{name}")) is not None
    }
    tensors = {tensor.name: int(tensor.n_elements) for tensor in contents.tensors}
    key_length = contents.fields.get(f"{architecture}.attention.key_length")
    config = model.config
    window_field = contents.fields.get(f"{architecture}.attention.sliding_window")
    window = (window_field.contents() or None) if window_field else None  # 0: none
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale = getattr(config, "query_pre_attn_scalar", head_dim)
    caps = {
        name: field.contents()
        for name in ("attn_logit_softcapping", "final_logit_softcapping")
        if (field := contents.fields.get(f"{architecture}.{name}")) is not None
    }
    owned = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    if "rope_freqs.weight" in tensors or rope.get("scaling.type", "none") != "none":
        lost = "its RoPE scaling"
    elif rope.get("dimension_count", head_dim) != head_dim:
        lost = f"that {rope['dimension_count']} features of a head are rotated"
    elif "freq_base_swa" in rope:
        lost = "the RoPE base of its layers with sliding windows"
    elif scale != head_dim:  # the largest Gemmas', which no field of theirs says
        lost = f"what its attention scores are divided by (it takes the root of {scale})"
    elif other := [name for name, cap in caps.items() if cap != getattr(config, name, None)]:
        lost = f"its {' and '.join(other)}"
    elif key_length is not None and key_length.contents() != head_dim:
        lost = f"its head size, {key_length.contents()}"
    elif window != getattr(config, "sliding_window", None):  # its class may have one by default
        lost = f"its sliding window ({window or 'none'})"
    elif sorted(tensors.values()) != sorted(owned.values()):
        lost = f"some of its tensors ({len(tensors)} in the file, {len(owned)} in {type(model).__name__})"
    else:
        return
    raise ConfigError(
        f"{path}: transformers does not read {lost}, so the result would be another model. Convert the "
        "model's original Hugging Face directory."
    )
