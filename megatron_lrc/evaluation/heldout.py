"""Held-out tokens: documents end to end, cut into windows of which each token but the very first is a label once.

From indexed datasets the documents of the validation or test part are taken, which `--split` cuts where a
training run cuts it. They are read in the order of the file, not in a run's shuffled one: no figure depends
on a seed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy
import torch
from torch import Tensor

from megatron_lrc.config import Config, ConfigError
from megatron_lrc.data.blends import plan_data
from megatron_lrc.data.encoding import ChunkEncoder, read_chunks
from megatron_lrc.data.indexed_files import read_indexed_file
from megatron_lrc.data.input_files import find_files
from megatron_lrc.data.loaded_tokenizer import describe_unlike
from megatron_lrc.data.restart import Position
from megatron_lrc.data.tokenizers import load_tokenizer

Part = Literal["valid", "test", "all"]


@dataclass(frozen=True)
class Corpus:
    """Token ids [n] of any integer dtype, maybe memory-mapped, under a name."""

    name: str
    tokens: numpy.ndarray

    def windows(self, seq_length: int, max_tokens: int = 0) -> list[range]:
        """Places of windows of seq_length + 1 tokens that share one with their neighbour, a shorter one at the end.

        max_tokens: so many labels at most (but one window), in windows taken evenly from the whole; 0: all.
        """
        labels = len(self.tokens) - 1
        if labels < 1:
            raise ConfigError(f"{self.name} has {len(self.tokens)} tokens. At least two are needed: give more text.")
        starts = range(0, labels, seq_length)
        if max_tokens and labels > max_tokens and labels > seq_length:
            whole = labels // seq_length
            count = min(whole, max(1, max_tokens // seq_length))
            starts = [seq_length * (number * whole // count) for number in range(count)]
        return [range(start, min(start + seq_length, labels) + 1) for start in starts]

    def batches(self, seq_length: int, batch_size: int, vocab_size: int, max_tokens: int = 0) -> Iterator[Tensor]:
        """int64 [b, s + 1], windows of one length each. ConfigError for an id that is not below vocab_size."""
        windows = self.windows(seq_length, max_tokens)
        while windows:
            here = [window for window in windows[:batch_size] if len(window) == len(windows[0])]
            windows = windows[len(here) :]
            rows = numpy.stack([self.tokens[window.start : window.stop] for window in here]).astype(numpy.int64)
            if rows.min() < 0 or rows.max() >= vocab_size:
                wrong = rows.max() if rows.max() >= vocab_size else rows.min()
                raise ConfigError(
                    f"{self.name} holds token id {wrong}, but the model's ids are 0 to {vocab_size - 1}: "
                    "another tokenizer made it. Write the data again with the model's."
                )
            yield torch.from_numpy(rows)


def read_indexed(prefixes: list[str], split: str, part: Part, tokenizer_directory: Path) -> list[Corpus]:
    """The part's documents of each dataset. ConfigError where a manifest names another tokenizer than the model's."""
    bounds = _bounds(split, part)
    tokenizer = None
    corpora = []
    for prefix in prefixes:
        file = read_indexed_file(prefix)
        if file.manifest:
            tokenizer = tokenizer or load_tokenizer(str(tokenizer_directory))
            if not tokenizer.made(file.manifest["tokenizer"]):
                raise ConfigError(
                    f"{prefix} was made with the tokenizer {describe_unlike(file.manifest['tokenizer'])}, and that of "
                    f"{tokenizer_directory} is another one. Write the data again with the model's tokenizer."
                )
        documents = file.documents(bounds)
        lengths = file.lengths
        start = int(lengths[: documents.start].sum(dtype=numpy.int64))
        stop = start + int(lengths[documents.start : documents.stop].sum(dtype=numpy.int64))
        if stop - start < 2:
            raise ConfigError(
                f"The {part} part of --split {split} of {prefix} has {stop - start} tokens ({len(documents)} "
                f"of {len(lengths)} documents). Use another --split, or --eval-split."
            )
        corpora.append(Corpus(prefix, file.tokens[start:stop]))
    return corpora


def _bounds(split: str, part: Part) -> tuple[float, float]:
    """Where the part begins and ends, as fractions of the documents."""
    if part == "all":
        return 0.0, 1.0
    config = Config()
    config.data.data_path, config.data.split, config.logging.eval_iters = ["any"], split, 1
    plan = plan_data(config)
    return plan.valid_part if part == "valid" else (plan.valid_part[1], 1.0)


def read_text(inputs: list[str], key: str, tokenizer_directory: Path, report: Callable[[str], None] = print) -> Corpus:
    """All documents of these files (text, JSON lines, parquet, packed or not), each ended by the end-of-document token.

    As tools/preprocess_data.py --append-eod writes them. ConfigError for a line without text under `key`.
    report: gets a line on the files of folders that are passed over.
    """
    tokenizer = load_tokenizer(str(tokenizer_directory))
    after = [] if tokenizer.eod is None else [tokenizer.eod]
    encode = ChunkEncoder(
        keys=[key],
        encode_batch=tokenizer.encode_batch,
        vocab_size=tokenizer.vocab_size,
        after=after,
        chat=tokenizer.chat,
    )
    pieces, position = [numpy.zeros(0, dtype=numpy.int32)], Position()
    for chunk in read_chunks(find_files(inputs, report), [key]):
        encoded = encode(chunk)
        if encoded.bad_lines:
            raise ConfigError(f"{encoded.name_bad_lines(position)[0]}. Correct it, or leave the file out.")
        position = encoded.end(position)
        pieces.append(encoded.tokens[key])
    return Corpus(", ".join(inputs), numpy.concatenate(pieces))
