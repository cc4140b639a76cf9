"""--pipeline-model-parallel-layout: what megatron-core cannot read, or is not of this model, is refused in one line."""

import pytest
from test_config import SMOLLM2

from megatron_lrc.config import Config, ConfigError
from megatron_lrc.mcore.models import check_pipeline_layout


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
