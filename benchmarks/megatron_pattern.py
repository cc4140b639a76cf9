"""Data preparation as Megatron-LM does it, without its options: what `tools/benchmark.py data` compares ours with.

    python -m benchmarks.megatron_pattern --input A.jsonl --output-prefix O --tokenizer-model DIR --workers 2

A pool of processes takes one line after the other: JSON, then one call of transformers' tokenizer. `imap` hands the
documents back one by one, in order, and megatron-core's builder writes each as it comes.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from typing import Any

CHUNK_SIZE = 32  # lines per message to a worker: Megatron-LM's figure

_tokenizer: Any = None  # one in each worker


def load(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The ids of one document and the end-of-document token; none for a text that gives none."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if ids else []


def reference_tokens(path: str, texts: Iterable[str]) -> Iterator[list[int]]:
    """What transformers' tokenizer says of each text, one call per text."""
    tokenizer = load(path)
    return (tokens_of(tokenizer, text) for text in texts)


def prepare(paths: list[str], output_prefix: str, tokenizer_model: str, workers: int) -> None:
    """Writes OUTPUT_PREFIX_text_document.bin and .idx."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix = f"{output_prefix}_text_document"
    dtype = DType.optimal_dtype(len(load(tokenizer_model)))
    with multiprocessing.Pool(workers, initializer=_start_worker, initargs=(tokenizer_model,)) as pool:
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for ids in pool.imap(_encode, _read_lines(paths), CHUNK_SIZE):
            builder.add_document(ids, [len(ids)] if ids else [])  # type: ignore[arg-type]
        builder.finalize(f"{prefix}.idx")


def _start_worker(tokenizer_model: str) -> None:
    global _tokenizer
    _tokenizer = load(tokenizer_model)


def _encode(line: str) -> list[int]:
    return tokens_of(_tokenizer, json.loads(line)["text"])


def _read_lines(paths: list[str]) -> Iterator[str]:
    for path in paths:
        with open(path, encoding="utf-8") as file:
            yield from file


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--tokenizer-model", required=True)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    prepare(arguments.input, arguments.output_prefix, arguments.tokenizer_model, arguments.workers)


if __name__ == "__main__":
    main()
