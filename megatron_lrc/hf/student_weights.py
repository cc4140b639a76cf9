"""The one place where a student's weights are made of its parts, whatever the method.

Its own weights are given as they are, composed ones are made by `sites.compose` in the dtype of the
projections, as in training, and what is frozen is its base's. Exports write what this gives, and
verifications of checkpoints compute with it. So comparing the two shows what went wrong with files, names,
config and the engines' arithmetic; that the composition itself is right is for the tests to show, which
compose by hand.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_lrc.checkpoints.saved_student import SavedStudent
from megatron_lrc.clone.kept_rows import UNIT_OF, KeptRows
from megatron_lrc.clone.sites import HeadLayout, compose, projection_names
from megatron_lrc.config import ConfigError, ModelShape
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import TeacherDescription, Weight, expected_weights
from megatron_lrc.hf.reader import Reader
from megatron_lrc.hf.safetensors_writer import write_tensors

PROJECTIONS_FILE = "projections.safetensors"


class StudentWeights:
    """The weights of one student; each is read and made when it is asked for, and not kept.

    base: its teacher, or the model that it was trained from; weights are read only where they are needed.
    projections: `embed`, `lm_head` (absent when tied), `layers.{i}.{q,k,v,o,gate,up,down}`, each (D, d); i counts the
    student's layers. kept: of a slimmer student, what its layers have of the teacher's.
    norms: `layers.{i}.input`, `layers.{i}.post`, `final`, each (d,). own: by `Weight.key`, what is neither
    composed nor the base's; it goes before all else. ConfigError where they are not the parts of a student of
    this base.
    """

    def __init__(
        self,
        base: TeacherDescription,
        shape: ModelShape,
        *,
        projections: Mapping[str, Tensor],
        norms: Mapping[str, Tensor],
        own: Mapping[str, Tensor] = MappingProxyType({}),
        kept: Mapping[int, KeptRows] = MappingProxyType({}),
    ):
        self.base, self.shape, self.kept = base, shape, kept
        self._projections, self._norms, self._own = projections, norms, own
        self._check_names()

    @classmethod
    def of(cls, student: SavedStudent, base: TeacherDescription) -> "StudentWeights":
        """Those of a checkpoint's student."""
        projections, norms, own = student.projections, student.norms, student.weights
        return cls(base, student.shape, projections=projections, norms=norms, own=own, kept=student.kept)

    def __call__(self, weight: Weight) -> Tensor:
        """In the dtype of what was trained, a frozen tensor in that of the base's files."""
        if weight.is_zero:
            return torch.zeros(weight.shape)
        if weight.key in self._own:
            return self._own[weight.key]
        if weight.is_frozen:
            return self._of_teacher(weight)
        given = (self._norms if weight.site is None else self._projections)[weight.key]  # [d] or [D, d]
        hidden, base_hidden = self.shape.hidden_size, self.base.shape.hidden_size
        expected = (hidden,) if weight.site is None else (base_hidden, hidden)
        if tuple(given.shape) != expected:
            raise ConfigError(
                f"The student's {weight.key} has shape {list(given.shape)}; with this teacher and hidden "
                f"size {hidden}, {list(expected)} is expected. Export with the teacher of the training run."
            )
        if weight.site is None:
            return given
        return compose(weight.site, self._of_teacher(weight).to(given.dtype), given)

    def _of_teacher(self, weight: Weight) -> Tensor:
        """What it is made of, or is."""
        name, layer = weight.local_name, weight.layer
        if layer is None:
            return self._reader.tensor(name, None)
        tensor = self._reader.tensor(name, self.shape.teacher_layer(layer))
        if layer not in self.kept or name not in UNIT_OF:
            return tensor
        rows = self.kept[layer].features(name, HeadLayout.of(self.base.shape))
        return tensor.index_select(weight.site.split if weight.site else 0, rows)

    def write_projections(self, folder: Path) -> None:
        """projections.safetensors, in their own dtype: by their names, and the gains under `norms.`"""
        names = projection_names(range(self.shape.num_layers), True, not self.shape.is_tied)
        shapes: dict[str, tuple[int, ...]] = {}
        shapes |= dict.fromkeys(names, (self.base.shape.hidden_size, self.shape.hidden_size))
        shapes |= {f"norms.{name}": (self.shape.hidden_size,) for name in self._norms}

        def tensor_of(name: str) -> Tensor:
            is_gain = name.startswith("norms.")
            return self._norms[name.removeprefix("norms.")] if is_gain else self._projections[name]

        dtype = self._projections["embed"].dtype
        write_tensors(folder / PROJECTIONS_FILE, shapes, dtype=dtype, tensor_of=tensor_of)

    @cached_property
    def _reader(self) -> Reader:
        return open_teacher(self.base)

    def _check_names(self) -> None:
        """Nothing is missing and nothing of another model is there. Shapes are checked as tensors are read."""
        weights = expected_weights(self.base.family, self.shape)
        if self.shape.is_tied and not self.base.shape.is_tied and "embed" not in self._own:
            raise ConfigError(
                "The student has no lm_head projection, but its teacher's embedding and LM head are two "
                "matrices: one projection cannot make both. Train with --untie-embeddings-and-output-weights."
            )
        for kind, found, wanted in (
            ("projections", self._projections, {weight.key for weight in weights if weight.site is not None}),
            ("norm gains", self._norms, {weight.key for weight in weights if weight.is_norm_gain}),
        ):
            differing = sorted((wanted - {*found, *self._own}) | (set(found) - wanted))
            if differing:
                raise ConfigError(
                    f"The student's {kind} and its teacher's layers do not belong together: "
                    f"{', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''} on one side only. "
                    "Export with the teacher of the training run."
                )
