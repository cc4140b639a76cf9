"""Tiny tokenizers, JSON-lines files and indexed datasets for tests; all made on the spot, nothing downloaded."""

import json
import random
from pathlib import Path

import numpy

WORDS = [f"word{number}" for number in range(40)]


def write_tokenizer(folder: Path, *, words: list[str] = WORDS, eos: bool = True) -> str:
    """A byte-level BPE tokenizer as a Hugging Face directory. It adds a BOS token, and its file truncates."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(words)] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(4)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>" if eos else None)
    fast.save_pretrained(folder)
    return str(folder)


def make_texts(num_documents: int, *, seed: int = 0) -> list[str]:
    """Documents of 1 to 30 words, some with characters of several bytes."""
    generator = random.Random(seed)
    return [
        " ".join(generator.choices([*WORDS, "na\u00efve", "\U0001f600"], k=generator.randint(1, 30)))
        for _ in range(num_documents)
    ]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def write_dataset(prefix: Path, documents: list[list[int]], *, dtype: type = numpy.uint16) -> str:
    """An indexed dataset without a manifest, straight from token ids."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(numpy.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_chats(prefix: Path, documents: list[list[int]], masks: list[list[bool]], tokenizer_folder: str) -> str:
    """A dataset with a manifest that names this tokenizer, and a mask of which tokens count."""
    from megatron_lrc.data.tokenizers import load_tokenizer
    from megatron_lrc.data.writing import DatasetWriter, publish

    tokenizer = load_tokenizer(tokenizer_folder)
    writer = DatasetWriter(str(prefix), tokenizer.vocab_size)
    tokens = numpy.array([token for document in documents for token in document], numpy.int32)
    writer.add(tokens, [len(document) for document in documents], numpy.concatenate(masks).astype(bool))
    writer.complete({"tokenizer": tokenizer.as_manifest(), "documents": writer.documents, "tokens": writer.tokens})
    publish(str(prefix))
    writer.close()
    return str(prefix)


def write_counting(prefix: Path) -> str:
    """A dataset that can be learned: noisy counting within 64 of `write_llama`'s 301 tokens."""
    generator = numpy.random.default_rng(0)
    documents = []
    for _ in range(200):
        steps = generator.choice([1, 1, 1, 2, 5], size=50)
        documents.append(((generator.integers(64) + numpy.cumsum(steps)) % 64 + 100).tolist())
    return write_dataset(prefix, documents)


def numbered(prefix: Path, num_documents: int, *, first: int = 0, length: int = 40) -> str:
    """A dataset in which every token id says where it stands, so that samples can be told apart."""
    ids = range(first, first + num_documents * length)
    documents = [list(ids[start : start + length]) for start in range(0, len(ids), length)]
    return write_dataset(prefix, documents)


def write_sequences(prefix: Path, documents: list[list[list[int]]], dtype: type = numpy.int32) -> str:
    """A dataset of megatron-core's own builder with several sequences per document."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(numpy.concatenate(document), [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def read_documents(prefix: object) -> list[list[int]]:
    """The token ids of each document, of one sequence each."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices
    assert len(bounds) == len(dataset) + 1
    return [dataset[index].tolist() for index in range(len(dataset))]


def write_zst(path: Path, parts: list[bytes]) -> None:
    """One frame for each part, as tools that append do."""
    import zstandard

    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in parts))


def write_parquet(path: Path, texts: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {"id": list(range(len(texts))), "text": texts}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=90)
