"""The projections in a training checkpoint of the code that was released with the paper (CURRENTF/LowRankClone).

It is what transformers' Trainer wrote there: config.json, the teacher's with some fields more, and safetensors that
hold what is trained and nothing of the teacher. `zoom` matrices are projections, each in the orientation of a linear
layer from student to teacher, [D, d], or back, [d, D]; `target` norms have the student's gains. Depending on that
code's switches q, k and v have a projection each or one together, and so do gate and up.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_lrc.config import ConfigError, ModelShape
from megatron_lrc.hf.narrowing import is_finite
from megatron_lrc.hf.teacher import locate, open_files
from megatron_lrc.json_files import read_object

#: Below the name of a layer: our name -> theirs. A file has one of two sets for q, k and v, and one of two for gate
#: and up. Those of q, k and v, and the one that gate and up share, are from student to teacher, [D, d]; the others are
#: [d, D].
_SHARED_READING = {site: "self_attn.zoom_up.weight" for site in "qkv"}
_OWN_READING = {site: f"self_attn.zoom_{site}.weight" for site in "qkv"}
_MLP = {site: f"mlp.zoom_{site}.weight" for site in ("gate", "up")}
_SHARED_MLP = {site: "mlp.zoom_up.weight" for site in ("gate", "up")}
_WRITING = {"o": "self_attn.zoom_down.weight", "down": "mlp.zoom_down.weight"}
_NORMS = {"input": "target_input_layernorm.weight", "post": "target_post_attention_layernorm.weight"}
_EMBED, _HEAD, _FINAL = "model.zoom.weight", "zoom_down.weight", "model.target_norm.weight"
#: Only losses have used it: it is in no student.
_FOR_LOSSES_ONLY = "zoom_out.weight"

#: config.json's names of what has to be the teacher's.
_OF_TEACHER = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "vocab_size",
}


class ReleasedProjections:
    """An open checkpoint. Making one checks all but the values, from the files' headers: ConfigError if they are not of
    a run with this teacher and this student."""

    def __init__(self, directory: str | Path, teacher: ModelShape, student: ModelShape) -> None:
        self._directory, self._teacher, self._student = Path(directory), teacher, student
        self._check_config()
        self._files = open_files(self._directory)
        self._file_of = locate(self._directory, self._files)
        self._sources = self._find_sources()
        self._check_tensors()

    def names(self) -> list[str]:
        """Global names of all projections and gains of the student, in an order that every rank has."""
        return list(self._sources)

    def is_gain(self, name: str) -> bool:
        return self._expected(name) == [self._student.hidden_size]

    def read(self, name: str) -> Tensor:
        """A projection [D, d] or a gain [d], as stored. ConfigError if a value is not finite."""
        source = self._sources[name]
        tensor = self._files[self._file_of[source]].get_tensor(source)
        if not is_finite(tensor):
            raise ConfigError(
                f"{self._directory}: tensor {source} holds values that are not finite (NaN or infinity). Give an "
                "earlier checkpoint of that run."
            )
        return tensor.t().contiguous() if self._is_transposed(source) else tensor

    def _check_config(self) -> None:
        try:
            values = read_object(self._directory / "config.json")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._directory} has no config.json that can be read ({error}).") from error
        if "target_hidden_size" not in values:
            raise ConfigError(
                f"{self._directory} is no training checkpoint of the released LRC code: its config.json has no "
                "target_hidden_size. Give the folder in which that code's Trainer saved model.safetensors with zoom "
                "matrices; a converted student is trained on with --method ordinary --student."
            )
        problems = list(self._differences(values))
        if problems:
            raise ConfigError(f"{self._directory}: {'; '.join(problems)}.")

    def _differences(self, values: dict[str, Any]) -> Iterator[str]:
        for theirs, ours in _OF_TEACHER.items():
            expected = getattr(self._teacher, ours)
            if values.get(theirs) != expected:
                yield f"its teacher had {theirs} {values.get(theirs)}, --teacher has {expected}"
        width, epsilon = self._student.hidden_size, self._student.norm_epsilon
        if values["target_hidden_size"] != width:
            yield f"its student is {values['target_hidden_size']} wide: give --student-hidden-size that, not {width}"
        given = values.get("target_rms_norm_eps", values.get("rms_norm_eps"))
        if given != epsilon:
            yield f"its student's norms have epsilon {given}: give --student-norm-epsilon that, not {epsilon:g}"

    def _find_sources(self) -> dict[str, str]:
        """Our name of each projection and gain -> the tensor that it is."""
        has_head = _HEAD in self._file_of
        if has_head and self._student.is_tied:
            raise ConfigError(
                f"{self._directory}: its LM head has a projection of its own. Add "
                "--untie-embeddings-and-output-weights."
            )
        sources = {"embed": _EMBED, "final": _FINAL}
        if not self._student.is_tied:
            sources["lm_head"] = _HEAD if has_head else _EMBED
        for layer in range(self._student.num_layers):
            prefix = f"model.layers.{self._student.teacher_layer(layer)}."
            has_one = prefix + _SHARED_READING["q"] in self._file_of
            gate = _MLP if prefix + _MLP["gate"] in self._file_of else _SHARED_MLP
            names = {**(_SHARED_READING if has_one else _OWN_READING), **_WRITING, **gate}
            gains = {norm: _NORMS.get(norm, norm) for norm in self._student.norms}
            sources |= {f"layers.{layer}.{ours}": prefix + theirs for ours, theirs in {**names, **gains}.items()}
        return sources

    def _check_tensors(self) -> None:
        missing = sorted({source for source in self._sources.values() if source not in self._file_of})
        if missing:
            raise ConfigError(
                f"{self._directory} has no tensor {missing[0]}{_others(missing)}, which this student needs. A run with "
                "--del_layers is continued with --student-layers and the layers that it kept."
            )
        unknown = sorted({*self._file_of} - {*self._sources.values()})
        if unknown := [name for name in unknown if not name.endswith(_FOR_LOSSES_ONLY)]:
            raise ConfigError(
                f"{self._directory} holds {unknown[0]}{_others(unknown)}, which is no projection of this student. It "
                "has other layers, or was trained with a switch of the released code that has no counterpart here."
            )
        for name, source in self._sources.items():
            shape = self._files[self._file_of[source]].get_slice(source).get_shape()
            expected = self._expected(name)
            if self._is_transposed(source):
                expected = expected[::-1]
            if shape != expected:
                raise ConfigError(f"{self._directory}: {source} has shape {shape}, expected is {expected}.")

    def _expected(self, name: str) -> list[int]:
        if name == "final" or name.rpartition(".")[2] in self._student.norms:
            return [self._student.hidden_size]
        return [self._teacher.hidden_size, self._student.hidden_size]

    def _is_transposed(self, source: str) -> bool:
        """Whether it is stored as [d, D]. Where gate and up share a matrix it is one from student to teacher."""
        if source.endswith(("norm.weight", *_OWN_READING.values(), _SHARED_READING["q"])):
            return False
        is_shared = source.endswith(_SHARED_MLP["gate"]) and source.replace("zoom_up", "zoom_gate") not in self._file_of
        return not is_shared


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
