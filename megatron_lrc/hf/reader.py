"""What a training, an export and a verification read a teacher through, in whichever form its weights are stored.

A form (`teacher.py`: safetensors; `checkpoint_reader.py`: a megatron-core checkpoint) says how rows, parts
and whole tensors are read; padding, tied heads and the look at the values are here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_lrc.checkpoints.layout import SITES
from megatron_lrc.clone.sites import EMBED, LM_HEAD, Site
from megatron_lrc.config import ConfigError
from megatron_lrc.hf.architectures import FROZEN_BIASES, FROZEN_WIDE_NORMS
from megatron_lrc.hf.constant_tensors import find_suspicious
from megatron_lrc.hf.content_hash import FileContents
from megatron_lrc.hf.families import TeacherDescription, Weight, expected_weights
from megatron_lrc.hf.narrowing import is_finite

Contents = Mapping[Path, FileContents]  # by the file's path

_SHOWN = 4  # problems in one message


class Reader(ABC):
    """The open files of one teacher. Tensors come in the stored dtype and in Hugging Face's order of rows.

    ConfigError where values are not finite: one NaN spreads through every sum of a training or a student.
    """

    description: TeacherDescription

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """Those that hold the weights."""

    @abstractmethod
    def fingerprint(self, contents: Contents | None = None) -> str:
        """Tells this teacher from others, wherever it lies. contents: of `files`; None reads all of them now.

        ConfigError where they are not what was written.
        """

    def sampled_fingerprint(self) -> str:
        """What earlier versions noted in checkpoints instead, or "" where that is not known."""
        return ""

    def suspicious(self, contents: Contents) -> list[str]:
        """Tensors that no trained model has, each with its file and what it is. contents: of `files`."""
        found = (what for path, found in contents.items() for what in find_suspicious(path, found.pieces))
        return [what for what in found if not self._is_gain_of_one(what)]

    def _is_gain_of_one(self, what: str) -> bool:
        """Whether `find_suspicious` has found a norm's gain that is stored as what is beyond 1."""
        shape, family = self.description.shape, self.description.family
        if not shape.has_zero_centered_norms or not what.endswith("all zero"):
            return False
        gains = (weight for weight in expected_weights(family, shape) if weight.site is None)
        return what.partition(" in ")[0] in {weight.name for weight in gains}

    @abstractmethod
    def _rows(self, site: Site, start: int, count: int) -> Tensor:
        """Rows of the embedding or the LM head, none of them padding."""

    @abstractmethod
    def _part(self, name: str, layer: int | None, rank: int, size: int) -> Tensor:
        """The `rank`-th of `size` tensor parallel parts of a layer's weight, bias or wide norm gain."""

    @abstractmethod
    def _whole(self, name: str, layer: int | None) -> Tensor:
        """A norm gain."""

    @abstractmethod
    def _place(self, key: str) -> str:
        """Name and file of the tensor with this `Weight.key`, for messages."""

    def site(
        self,
        site: Site,
        layer: int | None = None,
        *,
        tp_rank: int = 0,
        tp_size: int = 1,
        padded_vocab_size: int | None = None,
    ) -> Tensor:
        """This rank's part of a cloned weight: [o/tp, i] where rows are split, [o, i/tp] where columns are.

        embed, lm_head: [v_padded/tp, D]; rows beyond the vocabulary are zero. Without padded_vocab_size:
        unpadded.
        """
        if site in (EMBED, LM_HEAD):
            return self._vocabulary_rows(site, tp_rank, tp_size, padded_vocab_size or self.description.shape.vocab_size)
        return self._finite(self._part(site.name, layer, tp_rank, tp_size), site.name, layer)

    def norm(self, name: str, layer: int | None = None) -> Tensor:
        """A norm gain [D] as it is stored: one of `ModelShape.norms` of a layer, or "final"."""
        return self._finite(self._whole(name, layer), name, layer)

    def frozen(self, name: str, layer: int, *, tp_rank: int = 0, tp_size: int = 1) -> Tensor:
        """This rank's part of a frozen tensor: a bias or a wide norm's gain [o/tp], split like its weight, or a norm
        gain [head_dim]."""
        is_split = name in (*FROZEN_BIASES, *FROZEN_WIDE_NORMS)
        tensor = self._part(name, layer, tp_rank, tp_size) if is_split else self._whole(name, layer)
        return self._finite(tensor, name, layer)

    def tensor(self, name: str, layer: int | None, *, tp_rank: int = 0, tp_size: int = 1) -> Tensor:
        """Any of the three, by `Weight.local_name`. Norm gains are not split."""
        if name in SITES:
            return self.site(SITES[name], layer, tp_rank=tp_rank, tp_size=tp_size)
        if name in self.description.family.norms:
            return self.norm(name, layer)
        assert layer is not None, f"{name} belongs to a layer"
        return self.frozen(name, layer, tp_rank=tp_rank, tp_size=tp_size)

    def weight(self, weight: Weight) -> Tensor:
        """One of `expected_weights`, whole."""
        return self.tensor(weight.local_name, weight.layer)

    def _vocabulary_rows(self, site: Site, tp_rank: int, tp_size: int, padded_vocab_size: int) -> Tensor:
        shape = self.description.shape
        rows, remainder = divmod(padded_vocab_size, tp_size)
        assert remainder == 0 and padded_vocab_size >= shape.vocab_size, f"vocabulary padded to {padded_vocab_size}"
        source = EMBED if site == LM_HEAD and shape.is_tied else site
        start = min(tp_rank * rows, shape.vocab_size)
        own = self._finite(self._rows(source, start, min(rows, shape.vocab_size - start)), source.name, None)
        padding = own.new_zeros(rows - own.shape[0], shape.hidden_size)
        return torch.cat([own, padding]) if len(padding) else own

    def _refuse(self, problems: list[str], whose: str = "", *, remedy: str) -> None:
        """ConfigError if there are any, which names the first few. whose: the tensors that are expected."""
        if problems:
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise ConfigError(
                f"{self.description.given}: {'; '.join(problems[:_SHOWN])}{more}. Expected are exactly the "
                f"tensors that config.json implies{whose}. {remedy}"
            )

    def _finite(self, tensor: Tensor, name: str, layer: int | None) -> Tensor:
        if not is_finite(tensor):
            place = self._place(name if layer is None else f"layers.{layer}.{name}")
            raise ConfigError(
                f"{self.description.given}: tensor {place} holds values that are not finite (NaN or "
                f"infinity). Download or copy the file again, or choose another {self.description.role.noun}."
            )
        return tensor
