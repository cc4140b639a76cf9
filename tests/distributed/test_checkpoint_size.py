"""The disk space that --dry-run gives for a checkpoint is what one takes, on any layout."""

from pathlib import Path

import pytest

from megatron_lrc.estimate.disk import disk_need
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.methods import method_of
from megatron_lrc.train import loop
from memory_cases import Case, memory_config
from ranks import run_ranks


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout", [{"bf16": True, "dp": 2}, {"bf16": True, "is_tied": True}, {"tp": 2}, {"pp": 2, "is_tied": True}], ids=str
)
def test_a_checkpoint_takes_the_space_that_is_estimated(tmp_path, layout):
    case = Case(384, 6, 2, 256, 2, 512, student=256, sequence=32, micro_batch=1, **layout)
    config = memory_config(case, tmp_path / "case")
    config.training.train_iters, config.checkpoint.save = 1, str(tmp_path / "run")
    run_ranks(case.ranks, loop.train, config)
    (checkpoint,) = Path(config.checkpoint.save).glob("iter_*")
    written = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    shape = describe_teacher(config.model.teacher or "").shape
    need = disk_need(config, shape, method_of(config).student_shape(shape))
    assert need.count == 1
    assert need.one == pytest.approx(written, rel=0.03)
