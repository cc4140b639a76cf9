"""The order in which a run goes through its samples: shuffled passes over each dataset, blended.

The order is one endless sequence that follows from the datasets' .idx files, the part of their documents, the
sequence length, the weights and the seed alone; how many samples a run asks for only says how far its maps
reach. So a position in it (a number of samples) means the same after a change of batch sizes, processes,
steps or epochs.

    one pass     the documents shuffled, laid end to end and cut into samples, those shuffled again: GPTDataset's way.
                 A sample is seq_length + 1 tokens; neighbours share one (the last label of one is the first input of
                 the next). Fewer tokens than that are left at the end, other ones in every pass: they are dropped.
                 Passes differ in their seed.
    no weights   pass after pass over all datasets, each whole; within a pass in proportion to their samples
    weights      each dataset passed over as often as its share asks for

Rejected: GPTDataset's own maps and BlendedMegatronDatasetBuilder. They shuffle all passes but the last
together, so that a longer request gives another order, and repeat the datasets of a blend by weights only.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property

import numpy

from megatron_lrc.data.blends import Blend
from megatron_lrc.data.identity import index_digest
from megatron_lrc.data.indexed_files import IndexedFile, read_indexed_file

_FORMAT = 1  # of what the maps hold; part of every identity


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset's part in an order. `documents` are those drawn from."""

    file: IndexedFile
    documents: range
    seq_length: int

    @cached_property
    def num_tokens(self) -> int:
        return int(self.file.lengths[self.documents.start : self.documents.stop].sum(dtype=numpy.int64))

    @cached_property
    def samples_per_pass(self) -> int:
        return (self.num_tokens - 1) // self.seq_length

    def maps(self, seed: int, num_passes: int) -> dict[str, numpy.ndarray]:
        """GPTDataset's three maps over several passes. L samples and D documents in each:

        documents [num_passes * D]: document ids. samples [num_passes * (L + 1), 2]: place in `documents` and
        offset in tokens where each sample begins, and one row for the end of each pass. shuffle [num_passes *
        L]: rows of `samples` in the order of use. Integers as narrow as they fit.
        """
        from megatron.core.datasets import helpers

        lengths = numpy.array(self.file.lengths)  # read once, and aligned, for the compiled helper
        documents, samples, shuffle = [], [], []
        for number in range(num_passes):
            random = numpy.random.RandomState(_pass_seed(seed, number))
            shuffled = numpy.arange(self.documents.start, self.documents.stop, dtype=numpy.int32)
            random.shuffle(shuffled)
            starts = helpers.build_sample_idx(lengths, shuffled, self.seq_length, 1, self.num_tokens)
            order = numpy.arange(len(starts) - 1, dtype=numpy.int64)
            random.shuffle(order)
            documents.append(shuffled)
            samples.append(_narrow(starts.astype(numpy.int64) + [number * len(shuffled), 0]))
            shuffle.append(_narrow(order + number * len(starts)))
        parts = {"documents": documents, "samples": samples, "shuffle": shuffle}
        return {name: numpy.concatenate(arrays) for name, arrays in parts.items()}


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """The order of one blend."""

    sources: list[Source]
    weights: list[float] | None  # sum to 1
    seed: int

    @classmethod
    def of(cls, blend: Blend, part: tuple[float, float], *, seq_length: int, seed: int) -> "SampleOrder":
        """`part`: from and to, as fractions of each dataset's documents. ConfigError for a damaged dataset."""
        files = [read_indexed_file(prefix) for prefix in blend.prefixes]
        sources = [Source(file=file, documents=file.documents(part), seq_length=seq_length) for file in files]
        weights = blend.weights if len(sources) > 1 else None  # of one dataset they say nothing
        weights = weights and [weight / sum(weights) for weight in weights]
        return cls(sources=sources, weights=weights, seed=seed)

    @cached_property
    def identity(self) -> str:
        """Hash over all that decides the order; holds no path, so data and maps can be moved together."""
        return digest_of([_FORMAT, [_hash_of(source) for source in self.sources], self.weights, self.seed])

    @property
    def samples_per_pass(self) -> int:
        """Samples of a pass over all datasets."""
        return sum(source.samples_per_pass for source in self.sources)

    def reach(self, num_samples: int) -> int:
        """How far maps for `num_samples` go: that far with weights, else to the end of a pass."""
        if self.weights:
            return num_samples
        return math.ceil(num_samples / self.samples_per_pass) * self.samples_per_pass

    def blending(self, reach: int) -> tuple[numpy.ndarray, numpy.ndarray] | None:
        """For each sample its dataset (int16) and its number there (int64); None for a single dataset.

        [reach] with weights, else [samples_per_pass]: every pass is blended alike.
        """
        from megatron.core.datasets.helpers_cpp import build_blending_indices, build_exhaustive_blending_indices

        count = len(self.sources)
        if count == 1:
            return None
        size = reach if self.weights else self.samples_per_pass
        datasets, samples = numpy.zeros(size, dtype=numpy.int16), numpy.zeros(size, dtype=numpy.int64)
        if self.weights:
            build_blending_indices(datasets, samples, self.weights, count, size, False)
        else:
            sizes = [source.samples_per_pass for source in self.sources]
            build_exhaustive_blending_indices(datasets, samples, sizes, count)
        return datasets, samples

    def passes(self, reach: int, datasets: numpy.ndarray | None) -> list[int]:
        """Passes of each dataset that a blending draws from, the last one maybe in part; one where it draws nothing."""
        if self.weights is None or datasets is None:
            return [reach // self.samples_per_pass] * len(self.sources)
        counts = numpy.bincount(datasets, minlength=len(self.sources))
        return [math.ceil(max(n, 1) / source.samples_per_pass) for n, source in zip(counts, self.sources, strict=True)]


def _pass_seed(seed: int, number: int) -> int:
    """The first pass has the run's seed, as megatron-core's would; later ones share no pass with a run of seed + 1."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} pass {number}".encode()).digest()[:4], "little")


def _narrow(numbers: numpy.ndarray) -> numpy.ndarray:
    fits = numbers.max(initial=0) <= numpy.iinfo(numpy.int32).max
    return numbers.astype(numpy.int32) if fits else numbers


def digest_of(values: list) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def _hash_of(source: Source) -> str:
    digest = index_digest(source.file.prefix)
    return digest_of([digest, source.documents.start, source.documents.stop, source.seq_length])
