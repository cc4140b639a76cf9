"""--pipeline-model-parallel-layout: refused in one line where it cannot be read; and the layers of each stage."""

from dataclasses import replace

import pytest

from config_cases import SMOLLM2
from megatron_lrc.config import Config, ConfigError, parse_config
from megatron_lrc.estimate.published_teachers import TEACHER_SHAPES
from megatron_lrc.estimate.stage import stages_of
from megatron_lrc.mcore.gpt_models import check_pipeline_layout, layers_per_stage
from megatron_lrc.methods import method_of


def check(layout: str | None, *, pp: int = 2, chunks: int | None = None) -> None:
    config = Config()
    config.parallel.pipeline_model_parallel_layout = layout
    config.parallel.pipeline_model_parallel_size = pp
    config.parallel.num_virtual_stages_per_pipeline_rank = chunks
    check_pipeline_layout(config, SMOLLM2)


def test_layouts_of_this_model_pass():
    check(None)
    check("Et*30|L")
    check("Et*14|(t|)*15tL", pp=17)
    check("Et*10|t*10|t*10|L", chunks=2)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("Et*29|L", "Expected is an E first, 30 t (the teacher's layers) and an L last, over 2 stages"),
        ("t*30|L", "The first layer must be embedding"),
        ("Et*30L", "--pipeline-model-parallel-layout Et*30L: "),
        ("Et*30|X", "--pipeline-model-parallel-layout Et*30|X: "),
        ("Et*10|t*10|t*10|L", "has 4 stages, 2 on each of 2 ranks; --num-virtual-stages-per-pipeline-rank says 1"),
    ],
)
def test_other_layouts_are_refused_in_one_line(layout, expected):
    with pytest.raises(ConfigError) as caught:
        check(layout)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", [[12]]),
        ("--pipeline-model-parallel-size 4", [[3], [3], [3], [3]]),
        ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3", [[2, 2, 2], [2, 2, 2]]),
        ("--pipeline-model-parallel-size 3 --decoder-last-pipeline-num-layers 2", [[5], [5], [2]]),
        ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*7|t*5L", [[7], [5]]),
        (
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
            "--pipeline-model-parallel-layout Et|t*4|t*5|t*2L",
            [[1, 5], [4, 2]],
        ),
    ],
)
def test_the_layers_of_every_stage_are_known_without_process_groups(flags, expected):
    config = parse_config([*flags.split(), "--student-hidden-size", "8"])
    shape = replace(TEACHER_SHAPES["Llama-2-7b-chat"], num_layers=12)
    assert layers_per_stage(config, shape) == expected
    stages = stages_of(config, shape, method_of(config).student_shape(shape))
    assert sorted(layer for stage in stages for chunk in stage.layers for layer in chunk) == list(range(12))
