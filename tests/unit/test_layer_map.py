"""Which of the teacher's layers a student has: the flags, what they refuse, and the stages that follow."""

import json
from dataclasses import asdict, replace

import pytest

from config_cases import SMOLLM2, change, errors_of
from megatron_lrc.config import (
    Config,
    ModelShape,
    check_layers,
    check_layers_against,
    describe_layers,
    parse_config,
    spread_evenly,
)
from megatron_lrc.mcore.student_stages import check_student_stages, config_of_student, layers_by_stage
from megatron_lrc.methods import method_of

FOUR = replace(SMOLLM2, num_layers=4)


def config_with(flags: str) -> Config:
    return parse_config(["--student-hidden-size", "288", *flags.split()])


def shape_of(flags: str, base: ModelShape = SMOLLM2) -> ModelShape:
    return method_of(config_with(flags)).student_shape(base)


@pytest.mark.parametrize("count", range(1, 31))
def test_an_even_spread_has_the_ends_and_steps_that_differ_by_one(count):
    layers = spread_evenly(count, 30)
    steps = {after - before for before, after in zip(layers, layers[1:], strict=False)}
    assert len(layers) == count and layers[0] == 0 and (count == 1 or layers[-1] == 29)
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


def test_given_and_counted_layers_are_those_of_the_students_shape():
    given = shape_of("--student-layers 0 2-3", FOUR)
    assert (given.num_layers, given.teacher_layers) == (3, (0, 2, 3))
    assert shape_of("--student-num-layers 3", FOUR).teacher_layers == (0, 2, 3)
    assert [given.teacher_layer(layer) for layer in range(3)] == [0, 2, 3]
    assert given.teacher_name("layers.1.q") == "layers.2.q" and given.teacher_name("final") == "final"
    assert given.layers_among(range(2, 4)) == (1, 2) and given.layers_among(range(1, 2)) == ()
    assert describe_layers((0, 2, 3, 4, 7)) == "0 2-4 7"


@pytest.mark.parametrize("flags", ["", "--student-num-layers 4", "--student-layers 0-3", "--student-layers 0 1 2,3"])
def test_all_layers_are_no_map(flags):
    """So that such a run goes the way of one without the flags."""
    assert shape_of(flags, FOUR) == replace(FOUR, hidden_size=288)


def test_a_shape_survives_json_and_older_records_have_no_map():
    shape = shape_of("--student-layers 0 2-3", FOUR)
    values = json.loads(json.dumps(asdict(shape)))
    assert ModelShape(**values) == shape
    for name in ("teacher_layers", "sliding_window", "windowed_layers", "unrotated_layers"):
        del values[name]
    assert ModelShape(**values).teacher_layers == ()


def test_what_differs_from_layer_to_layer_follows_the_map():
    base = replace(FOUR, sliding_window=7, windowed_layers=(1, 2), unrotated_layers=(3,))
    shape = shape_of("--student-layers 0 2-3", base)
    for same in (shape, shape.without_teacher(), ModelShape(**json.loads(json.dumps(asdict(shape))))):
        assert [same.window(layer) for layer in range(3)] == [None, 7, None]
        assert [same.is_rotated(layer) for layer in range(3)] == [True, True, False]
    assert shape.without_teacher().teacher_layers == ()
    alone = method_of(config_with("--method ordinary --student-layers 0 2-3")).student_shape(base)
    assert alone == replace(shape.without_teacher(), is_tied=alone.is_tied)
    assert base.without_teacher() == base


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"student_layers": ["0", "x"]}, "--student-layers 0 x: invalid literal"),
        ({"student_layers": ["5-3"]}, "'5-3' holds no layer"),
        ({"student_layers": ["0", "2", "1"]}, "is out of order or names a layer twice"),
        ({"student_layers": ["0-2", "2"]}, "is out of order or names a layer twice"),
        ({"student_layers": ["0-2"], "student_num_layers": 4}, "names 3 layers, and --student-num-layers is 4"),
    ],
)
def test_what_is_no_list_of_layers_is_refused(values, expected):
    config = Config()
    change(config, **values)
    (message,) = check_layers(config.model)
    assert expected in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--student-layers 0 30", "names layer 30, which the teacher does not have: its 30 layers are 0-29"),
        ("--student-num-layers 31", "--student-num-layers 31 is above the teacher's 30"),
    ],
)
def test_layers_that_the_teacher_lacks_are_refused(flags, expected):
    config = config_with(flags)
    method_of(config).student_shape(SMOLLM2)  # is asked for first
    (message,) = check_layers_against(config.model, 30)
    assert expected in message
    assert [message] == list(method_of(config).check_against(SMOLLM2))


def test_layers_that_are_only_counted_get_a_warning():
    """Of a clone; a new model has no layers of anyone's."""
    (warning,) = method_of(config_with("--student-num-layers 20")).warn_against(SMOLLM2)
    assert warning.startswith("--student-num-layers 20 spreads the layers evenly") and "plan.py layers" in warning
    for flags in ("--student-num-layers 30", "--student-layers 0-19", "--method ordinary --student-num-layers 20"):
        assert not list(method_of(config_with(flags)).warn_against(SMOLLM2))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--method sheared --student-num-layers 4", "--student-num-layers 4 cannot go with --method sheared"),
        ("--method ordinary --student-layers 0 1", "--student-layers 0 1 cannot go with --method ordinary"),
        ("--method ordinary --student DIR --student-num-layers 4", "--student-num-layers 4 cannot go with --student"),
    ],
)
def test_methods_that_make_no_layers_of_a_teachers_refuse_them(flags, expected):
    errors = list(method_of(config_with(f"--teacher DIR {flags}")).check())
    assert any(error.startswith(expected) for error in errors), errors


def test_a_new_model_of_fewer_layers_is_made_of_nobodys():
    shape = shape_of("--method ordinary --teacher DIR --student-num-layers 4")
    assert (shape.num_layers, shape.teacher_layers) == (4, ())


def test_clone_terms_name_the_students_layers():
    config = config_with("--student-num-layers 4 --clone-terms q:0-3 k:4")
    (message,) = method_of(config).check_against(SMOLLM2)
    assert message.startswith("--clone-terms k:4 names a layer that the student does not have: its 4 layers are 0-3.")


PP2 = "--pipeline-model-parallel-size 2 --teacher DIR"


@pytest.mark.parametrize(
    ("flags", "layout"),
    [
        (f"{PP2} --student-layers 0 2-3", "Et|ttL"),
        (f"{PP2} --decoder-first-pipeline-num-layers 3 --student-layers 0 2-3", "Ett|tL"),
        (f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --student-num-layers 4", None),
        (f"{PP2} --pipeline-model-parallel-layout E|tt|(t)*2|L --num-virtual-stages-per-pipeline-rank 2", None),
        (f"{PP2} --pipeline-model-parallel-layout Etttt|L --student-layers 1 3", "Ett|L"),
        ("--teacher DIR --student-layers 1 3", None),
    ],
)
def test_the_student_is_divided_as_its_teacher_is(flags, layout):
    config = config_with(flags)
    student = method_of(config).student_shape(FOUR)
    check_student_stages(config, FOUR, student)
    divided = config_of_student(config, FOUR, student)
    if layout is None:
        assert divided is config
        return
    assert divided.parallel.pipeline_model_parallel_layout == layout
    counts = [len(held) for held in layers_by_stage(divided, student).values()]
    assert counts == [part.count("t") for part in layout.split("|")]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (f"{PP2} --student-layers 0 1", "Pipeline stage 1 would hold layers 2-3 of the teacher"),
        (
            f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --student-layers 0 1 3",
            "Pipeline stage 2 would hold layers 2-2 of the teacher",
        ),
    ],
)
def test_a_stage_without_a_layer_of_the_student_is_refused_in_one_sentence(flags, expected):
    config = config_with(flags)
    (message,) = errors_of(check_student_stages, config, FOUR, method_of(config).student_shape(FOUR))
    assert message.startswith(expected)
