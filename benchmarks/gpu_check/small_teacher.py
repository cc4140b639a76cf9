"""A small random teacher as a Hugging Face directory, and data that can be learned, for stages that need files.

The teacher's values are bf16's, so that models in any precision, and the reference in fp64, have the same ones.
"""

from typing import Any

import numpy
import torch

from benchmarks.gpu_check.settings import Settings, Sizes


def teacher_of(settings: Settings) -> str:
    """Its directory, in the folder of the checks; written by whoever asks first."""
    directory = settings.folder / "teacher"
    if not directory.exists():
        _model_of(settings.sizes).save_pretrained(directory)
    return str(directory)


def _model_of(sizes: Sizes) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.groups,
        head_dim=sizes.head_dim,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.05)
    return model.bfloat16()


def write_counting(settings: Settings) -> str:
    """The prefix of an indexed dataset: noisy counting, in half of the vocabulary."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix, size = settings.folder / "counting", settings.sizes.vocabulary // 2
    generator = numpy.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)  # type: ignore[arg-type]
    for _ in range(400):
        steps = generator.choice([1, 1, 1, 2, 5], size=100)
        tokens = (generator.integers(size) + numpy.cumsum(steps)) % size
        builder.add_document(tokens, [len(tokens)])  # type: ignore[arg-type]
    builder.finalize(f"{prefix}.idx")
    return str(prefix)
