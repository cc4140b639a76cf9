"""Which of its teacher's layers a student has: --student-layers names them, --student-num-layers spreads them evenly.
`tools/plan.py layers` measures which ones to name.

Student layer i is made of teacher layer `layers[i]` and compared with it; the teacher runs all of its layers. The
chosen layers are a field of the student's `ModelShape`, and everything that pairs layers asks that.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise

from .settings import ModelConfig


def parse_layers(text: str) -> list[range]:
    """`0-3,7` -> [range(0, 4), range(7, 8)]. ValueError if it is no such text."""
    ranges = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ranges.append(range(int(first), int(last if dash else first) + 1))
        if not ranges[-1]:
            raise ValueError(f"{part!r} holds no layer")
    return ranges


def describe_layers(layers: Iterable[int]) -> str:
    """(0, 2, 3, 4, 7) -> `0 2-4 7`, which --student-layers takes."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def spread_evenly(count: int, num_layers: int) -> tuple[int, ...]:
    """`count` of num_layers layers, the first and the last among them, at distances that differ by one at most."""
    steps = max(count - 1, 1)
    return tuple((2 * place * (num_layers - 1) + steps) // (2 * steps) for place in range(count))


def most_important(importance: Sequence[float], count: int) -> tuple[int, ...]:
    """`count` layers in rising order, those that matter most; of equal ones the earlier."""
    return tuple(sorted(sorted(range(len(importance)), key=lambda layer: -importance[layer])[:count]))


def student_layers(model: ModelConfig, num_layers: int) -> tuple[int, ...]:
    """Of a teacher of num_layers layers those that the student has, in order; all of them is (), as without flags."""
    if model.student_layers:
        chosen = _given(model.student_layers)
    elif model.student_num_layers is not None:
        chosen = spread_evenly(model.student_num_layers, num_layers)
    else:
        return ()
    return () if chosen == tuple(range(num_layers)) else chosen


def check_layers(model: ModelConfig) -> Iterator[str]:
    """What is wrong with the flags, seen without a teacher."""
    given = " ".join(model.student_layers)
    try:
        chosen = _given(model.student_layers)
    except ValueError as problem:
        yield (
            f"--student-layers {given}: {problem}. Expected are layers of the teacher, counted from 0, and ranges of "
            "them, as in 0 1 3 5-11."
        )
        return
    if any(layer >= following for layer, following in pairwise(chosen)):
        yield (
            f"--student-layers {given} is out of order or names a layer twice: the student's layers follow each other "
            "as the teacher's do. Name each once, in rising order."
        )
    elif chosen and model.student_num_layers not in (None, len(chosen)):
        yield (
            f"--student-layers {given} names {len(chosen)} layers, and --student-num-layers is "
            f"{model.student_num_layers}. Make them agree, or leave one of them out."
        )


def check_layers_against(model: ModelConfig, num_layers: int) -> Iterator[str]:
    """The same, of a teacher of num_layers layers."""
    if model.student_layers and (last := _given(model.student_layers)[-1]) >= num_layers:
        yield (
            f"--student-layers {' '.join(model.student_layers)} names layer {last}, which the teacher does not have: "
            f"its {num_layers} layers are 0-{num_layers - 1}."
        )
    elif (count := model.student_num_layers) is not None and count > num_layers:
        yield (
            f"--student-num-layers {count} is above the teacher's {num_layers}, and no student is deeper than its "
            f"teacher. Use at most {num_layers}."
        )


def refuse_layers(model: ModelConfig, why: str) -> Iterator[str]:
    """Of a method that trains a model with the layers that it has. why: the end of a clause."""
    for flag, value in (("num-layers", model.student_num_layers), ("layers", " ".join(model.student_layers))):
        if value:
            yield f"--student-{flag} {value} cannot go with {why}. Leave it out."


def _given(texts: Sequence[str]) -> tuple[int, ...]:
    return tuple(layer for text in texts for layers in parse_layers(text) for layer in layers)
