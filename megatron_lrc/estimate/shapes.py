"""Shapes of a student that keep within a target, and what each costs to serve.

A size that a student may have is a row of AXES: the setting that gives it, and which values are looked at. The shapes
that are proposed are the largest ones within the targets: in none of them could any one size take its next value. Of
many, those that keep most of the size that they cut most: a half of one hurts more than three quarters of two.
Each is made by the method's own `student_shape`, so what is proposed here is what a run trains.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_lrc.config import Config, ConfigError, ModelConfig, ModelShape, flag_of, short_count
from megatron_lrc.estimate.flops import head_flops, layer_flops
from megatron_lrc.estimate.stage import parameter_count
from megatron_lrc.methods import method_of

#: Steps from nothing to the teacher's size, along an axis that no hardware wants in multiples of a number.
STEPS = 8


@dataclass(frozen=True, slots=True)
class Axis:
    """One size of a student. setting: in `ModelConfig`. field: in `ModelShape`. values: of the teacher's size and
    --hidden-size-divisor, rising, the teacher's own the last."""

    setting: str
    field: str
    heading: str
    values: Callable[[int, int], Sequence[int]]


def multiples(largest: int, divisor: int) -> list[int]:
    return [*range(divisor, largest, divisor), largest]


def eighths(largest: int, _: int) -> list[int]:
    """From the largest down, all alike apart."""
    return list(range(largest, 0, -max(1, largest // STEPS)))[::-1]


def eighths_in_multiples(largest: int, divisor: int) -> list[int]:
    """Eighths of the largest, rounded down to multiples; itself as it is."""
    rounded = {largest * step // STEPS // divisor * divisor for step in range(1, STEPS)} - {0}
    return [*sorted(rounded), largest]


AXES = (
    Axis("student_hidden_size", "hidden_size", "hidden", multiples),
    Axis("student_num_layers", "num_layers", "layers", eighths),
    Axis("student_num_query_groups", "num_query_groups", "KV groups", eighths),
    Axis("student_ffn_hidden_size", "ffn_hidden_size", "FFN", eighths_in_multiples),
)


@dataclass(frozen=True, slots=True)
class Serving:
    """How a student will be used. context_length: tokens of each of `batch_size` sequences that are decoded together.
    bytes_per_number: of weights and KV cache."""

    context_length: int = 4096
    batch_size: int = 1
    bytes_per_number: int = 2


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a model of one shape, at the end of its context.

    kv_cache_bytes: per token of the context. flops: of the forward pass, per decoded token. decode_bytes: read from
    memory per decoded token, the weights once for all sequences. memory_bytes: weights and the whole KV cache.
    """

    parameters: int
    kv_cache_bytes: int
    flops: float
    decode_bytes: float
    memory_bytes: float

    @classmethod
    def of(cls, shape: ModelShape, serving: Serving) -> "Cost":
        width, tokens, sequences = serving.bytes_per_number, serving.context_length, serving.batch_size
        parameters = parameter_count(shape)
        looked_up = 0 if shape.is_tied else shape.vocab_size * shape.hidden_size  # a row of it is read
        cache = 2 * shape.num_layers * shape.num_query_groups * shape.head_dim * width
        return cls(
            parameters=parameters,
            kv_cache_bytes=cache,
            flops=layer_flops(shape, tokens) * shape.num_layers + head_flops(shape),
            decode_bytes=(parameters - looked_up) * width / sequences + tokens * cache,
            memory_bytes=parameters * width + sequences * tokens * cache,
        )


@dataclass(frozen=True, slots=True)
class Target:
    """The most that a shape may cost. flag: with its value, as given. measure: a field of Cost."""

    flag: str
    measure: str
    most: float

    def share(self, cost: Cost) -> float:
        return getattr(cost, self.measure) / self.most


@dataclass(frozen=True, slots=True)
class Candidate:
    """sizes: setting -> value, of every axis that no flag has settled."""

    sizes: dict[str, int]
    student: ModelShape
    cost: Cost

    def flags(self) -> list[str]:
        """Those that train it, beside the ones that were given."""
        return [word for setting, size in self.sizes.items() for word in (flag_of(setting), str(size))]

    def numbers(self) -> dict[str, Any]:
        return {**sizes_of(self.student), **asdict(self.cost), "flags": " ".join(self.flags())}


def numbers_of(shape: ModelShape, serving: Serving) -> dict[str, Any]:
    """The same of a model that is there already."""
    return {**sizes_of(shape), **asdict(Cost.of(shape, serving))}


def sizes_of(shape: ModelShape) -> dict[str, int]:
    return {axis.field: getattr(shape, axis.field) for axis in AXES}


def find_shapes(
    config: Config, teacher: ModelShape, targets: Sequence[Target], serving: Serving, *, divisor: int, top: int
) -> list[Candidate]:
    """The largest shapes within all targets, at most `top` of them: those that keep most of the size of which they keep
    the least, the widest first. Sizes that config has stay as they are. ConfigError where there is none."""
    axes = [axis for axis in AXES if not _is_given(axis, config.model)]
    values = [axis.values(getattr(teacher, axis.field), divisor) for axis in axes]
    shapes = {}
    for place in itertools.product(*(range(len(sizes)) for sizes in values)):
        sizes = {axis.setting: sizes[step] for axis, sizes, step in zip(axes, values, place, strict=True)}
        student = method_of(replace(config, model=replace(config.model, **sizes))).student_shape(teacher)
        shapes[place] = Candidate(sizes, student, Cost.of(student, serving))

    def need(found: Candidate) -> float:
        """Of what is allowed; of the target that is hardest to keep."""
        return max(target.share(found.cost) for target in targets)

    fitting = {place for place, found in shapes.items() if need(found) <= 1}
    given = " with ".join(target.flag for target in targets)
    if not fitting:
        smallest = min(shapes.values(), key=need)
        raise ConfigError(
            f"{given} is too little: the smallest student of this teacher that is looked at "
            f"({_describe(smallest.student)}) takes {need(smallest):.3g} times as much. Allow more."
        )
    if len(fitting) == len(shapes) > 1:
        raise ConfigError(
            f"{given} holds every shape that is looked at, up to the teacher's own ({_describe(teacher)}). Allow less."
        )
    largest = [shapes[place] for place in fitting if not any(above in fitting for above in _above(place))]
    largest.sort(key=lambda found: (-_least_kept(found.student, teacher), -need(found), *_descending(found)))
    return sorted(largest[:top], key=_descending)


def _is_given(axis: Axis, model: ModelConfig) -> bool:
    return getattr(model, axis.setting) is not None or (axis.field == "num_layers" and bool(model.student_layers))


def _above(place: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The places at which one size takes its next value."""
    return (tuple(step + (axis == raised) for axis, step in enumerate(place)) for raised in range(len(place)))


def _least_kept(student: ModelShape, teacher: ModelShape) -> float:
    """The smallest share of the teacher's size along an axis."""
    return min(getattr(student, axis.field) / getattr(teacher, axis.field) for axis in AXES)


def _descending(found: Candidate) -> tuple[int, ...]:
    return tuple(-size for size in sizes_of(found.student).values())


def _describe(shape: ModelShape) -> str:
    sizes = ", ".join(f"{axis.heading} {getattr(shape, axis.field)}" for axis in AXES)
    return f"{sizes}: {short_count(parameter_count(shape))} parameters"
