"""What one process holds of both models: its layers, its ends, and how many elements each thing has.

Notation: D teacher hidden, d student hidden, v this rank's part of the vocabulary, padded; `/tp` split over TP.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from megatron_lrc.clone.sharing import divide
from megatron_lrc.clone.sites import EMBED, LAYER_SITES, LM_HEAD, Site
from megatron_lrc.config import Config, ModelShape
from megatron_lrc.hf.families import site_shape
from megatron_lrc.mcore.gpt_models import padded_vocab_size
from megatron_lrc.mcore.student_stages import layers_by_stage
from megatron_lrc.methods import method_of


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline rank's share, over all its chunks. layers: of each chunk, the teacher's, by global index, from 0;
    the student has those that are made of them."""

    config: Config
    teacher: ModelShape
    student: ModelShape
    rank: int
    layers: tuple[tuple[int, ...], ...]

    @property
    def tp(self) -> int:
        return self.config.parallel.tensor_model_parallel_size

    @property
    def student_layers(self) -> tuple[tuple[int, ...], ...]:
        """Of each chunk, the student's."""
        return tuple(self.student.layers_among(chunk) for chunk in self.layers)

    def num_layers(self, shape: ModelShape) -> int:
        """Of a model here."""
        return sum(len(shape.layers_among(chunk)) for chunk in self.layers)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.config.parallel.pipeline_model_parallel_size - 1

    @property
    def vocab_rows(self) -> int:
        return padded_vocab_size(self.teacher.vocab_size, self.tp) // self.tp

    def num_ends(self, shape: ModelShape) -> int:
        """Matrices of the size of the embedding that are held of a model: 0, 1 or 2."""
        # With both ends in one module a tied head is the embedding itself and not a copy.
        has_whole_model = self.is_first and self.is_last and self.config.num_chunks == 1
        return self.is_first + self.is_last - (shape.is_tied and has_whole_model)

    def site_elements(self, site: Site, shape: ModelShape) -> int:
        """Of one matrix, on this rank."""
        if site in (EMBED, LM_HEAD):
            return self.vocab_rows * shape.hidden_size
        rows, columns = site_shape(site, shape)
        return rows * columns // self.tp

    def matrix_elements(self, shape: ModelShape) -> int:
        """Of a model's cloned matrices."""
        layer = sum(self.site_elements(site, shape) for site in LAYER_SITES)
        return layer * self.num_layers(shape) + self.num_ends(shape) * self.site_elements(EMBED, shape)

    def weight_elements(self, shape: ModelShape) -> int:
        """Of a whole model: matrices, norm gains, and what is frozen."""
        return self.matrix_elements(shape) + self.gain_elements(shape) + self.frozen_elements(shape)

    def frozen_elements(self, shape: ModelShape) -> int:
        """Of q, k and v biases, and of q and k norms: frozen in a clone."""
        heads = shape.num_attention_heads + 2 * shape.num_query_groups
        biases = shape.has_qkv_bias * heads * shape.head_dim // self.tp + shape.has_qk_norm * 2 * shape.head_dim
        biases += shape.has_wide_qk_norm * (heads - shape.num_query_groups) * shape.head_dim // self.tp
        return biases * self.num_layers(shape)

    def gain_elements(self, shape: ModelShape) -> int:
        return (len(shape.norms) * self.num_layers(shape) + self.is_last) * shape.hidden_size

    @property
    def own(self) -> frozenset[str]:
        """The student's own matrices; of a run with --open-after those at its end."""
        method = method_of(self.config)
        return method.own_matrices(has_changed=method.changes)

    @property
    def looks_up(self) -> bool:
        """Whether the student's embeddings are rows of the teacher's, projected: it has no matrix of its own there."""
        return self.is_first and not self.student.is_tied and EMBED.name not in self.own

    @property
    def absent_elements(self) -> int:
        """Of the student's matrix that is not there for that."""
        return self.looks_up * self.site_elements(EMBED, self.student)

    @property
    def own_elements(self) -> int:
        """Of what of the student is its own, norm gains left out."""
        layer = sum(self.site_elements(site, self.student) for site in LAYER_SITES if site.name in self.own)
        total = layer * self.num_layers(self.student)
        if EMBED.name in self.own:
            total += self.num_ends(self.student) * self.site_elements(EMBED, self.student)
            total += self.frozen_elements(self.student)
        return total

    @property
    def composed(self) -> list[list[int]]:
        """Elements of each of the student's matrices that are composed, fused ones as one; of each chunk."""
        layer = [
            sum(self.site_elements(site, self.student) for site in sites if site.name not in self.own)
            for _, sites in groupby(LAYER_SITES, key=lambda site: site.linear)
        ]
        chunks = [[size for size in layer if size] * len(chunk) for chunk in self.student_layers]
        if EMBED.name not in self.own:
            end = self.site_elements(EMBED, self.student)
            ends = self.num_ends(self.student) - self.looks_up
            chunks[-1 if self.is_last else 0] += [end] * ends
        return chunks

    @property
    def composed_elements(self) -> int:
        return sum(map(sum, self.composed))

    def largest_share(self, replicas: int) -> float:
        """The part of compose and pull back that falls to one replica where so many divide them (`clone/sharing.py`).
        What a matrix costs is in proportion to its size."""
        most = 0
        for sizes in self.composed:
            loads = [0] * replicas
            for size, owner in zip(sizes, divide(sizes, replicas), strict=True):
                loads[owner] += size
            most += max(loads)
        return most / max(self.composed_elements, 1)

    @property
    def projection_elements(self) -> int:
        """Of this rank's rows of every P that makes a weight."""
        matrices = sum(site.name not in self.own for site in LAYER_SITES) * self.num_layers(self.student)
        matrices += (EMBED.name not in self.own) * self.num_ends(self.student)
        return matrices * self.projection_size // self.tp

    @property
    def fixed_elements(self) -> int:
        """Of this rank's rows of every P that makes only targets of the clone loss any more."""
        return sum(name in self.own for name in self.targets) * self.projection_size // self.tp

    @property
    def targets(self) -> list[str]:
        """Sites, layer by layer, whose outputs the clone loss takes from the teacher through a P."""
        through = {"down"} if self.config.loss.clone_attention_output == "teacher" else {"o", "down"}
        layers = (layer for chunk in self.student_layers for layer in chunk)
        return [name for layer in layers for name in method_of(self.config).terms_of(layer) & through]

    @property
    def trained_elements(self) -> int:
        return self.projection_elements + self.gain_elements(self.student) + self.own_elements

    @property
    def projection_size(self) -> int:
        """D * d, of one whole P."""
        return self.teacher.hidden_size * self.student.hidden_size


def parameter_count(shape: ModelShape) -> int:
    """Of a whole model, unpadded, as Hugging Face counts it."""
    layer = sum(math.prod(site_shape(site, shape)) for site in LAYER_SITES) + len(shape.norms) * shape.hidden_size
    heads = shape.num_attention_heads + 2 * shape.num_query_groups
    layer += shape.has_qkv_bias * heads * shape.head_dim + shape.has_qk_norm * 2 * shape.head_dim
    layer += shape.has_wide_qk_norm * (heads - shape.num_query_groups) * shape.head_dim
    ends = (1 if shape.is_tied else 2) * shape.vocab_size
    return layer * shape.num_layers + (ends + 1) * shape.hidden_size


def stages_of(config: Config, teacher: ModelShape, student: ModelShape) -> Iterator[Stage]:
    """One for each pipeline rank."""
    by_stage = layers_by_stage(config, teacher)
    for rank in range(config.parallel.pipeline_model_parallel_size):
        layers = tuple(tuple(by_stage[rank, chunk]) for chunk in range(config.num_chunks))
        yield Stage(config, teacher, student, rank, layers)
