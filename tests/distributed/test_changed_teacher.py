"""Ranks that share the reading of a teacher refuse a changed one together, before any of them trains."""

import shutil
from pathlib import Path

import pytest

from checkpoints import write_run
from megatron_lrc.hf.families import describe_teacher
from students import random_student
from worlds import World, training_flags

pytestmark = pytest.mark.distributed


def test_both_ranks_of_a_node_refuse_to_go_on_with_a_changed_teacher(tiny_llama, tiny_text, tmp_path: Path):
    teacher, run = Path(shutil.copytree(tiny_llama(max_shard_size="60KB"), tmp_path / "teacher")), tmp_path / "run"
    description = describe_teacher(teacher)
    write_run(run, description, *random_student(description, 24, has_lm_head=True))
    shard = sorted(teacher.glob("*.safetensors"))[3]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    flags = training_flags(str(teacher), tiny_text, run, "--untie-embeddings-and-output-weights", "--load", str(run))
    with World(2, flags, tmp_path / "logs") as world:
        assert world.wait(60) == [2, 2]
        for rank in range(2):
            assert "is not the teacher that" in world.said(rank) and "Traceback" not in world.said(rank)
    assert [path.name for path in run.iterdir()] == ["iter_0000003"]
