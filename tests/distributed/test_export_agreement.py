"""The layout leaves no trace in what a user gets: the exported students of whole runs agree between all of them."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from megatron_lrc.config import Config
from runs import make_config, on_layout, train
from tools_path import convert_to_hf

STEPS, AGREEMENT = 20, 1e-4
FOUR_RANKS = pytest.mark.slow

# id, ranks, what `on_layout` takes, sequences in a micro-batch (of 8 in a step). With TP the time goes into
# collectives, so micro-batches are large there.
LAYOUTS = [
    pytest.param(2, {"tp": 2}, 4, id="TP2+SP"),
    pytest.param(2, {"pp": 2}, 2, id="PP2"),
    pytest.param(2, {"pp": 2, "chunks": 2}, 2, id="PP2-interleaved-x2"),
    pytest.param(2, {}, 2, id="DP2"),
    pytest.param(2, {"dist_opt": True}, 2, id="DP2-distributed-optimizer"),
    pytest.param(2, {"cp": 2, "dist_opt": True}, 2, id="CP2-distributed-optimizer"),
    pytest.param(4, {"tp": 4}, 8, id="TP4+SP", marks=FOUR_RANKS),
    pytest.param(4, {"pp": 4}, 2, id="PP4", marks=FOUR_RANKS),
    pytest.param(4, {"tp": 2, "pp": 2}, 4, id="TP2+SPxPP2", marks=FOUR_RANKS),
    pytest.param(4, {"tp": 2}, 4, id="TP2+SPxDP2", marks=FOUR_RANKS),
    pytest.param(4, {"pp": 2}, 2, id="PP2xDP2", marks=FOUR_RANKS),
]


@pytest.fixture(scope="module")
def four_rank_config(tiny_llama, tiny_text) -> Config:
    """A run with every loss; its teacher has a layer and a KV head for each of four ranks."""
    config = make_config(tiny_llama(num_layers=4, num_kv_heads=4), tiny_text, Path("unset"), steps=STEPS)
    config.logging.eval_iters = 0
    return config


def train_and_export(config: Config, folder: Path, ranks: int = 1) -> dict[str, Tensor]:
    """The tensors in the exported student's safetensors."""
    train(replace(config, checkpoint=replace(config.checkpoint, save=str(folder / "run"))), ranks)
    assert convert_to_hf(["--load", str(folder / "run"), "--output", str(folder / "student"), "--no-verify"]) == 0
    return load_file(folder / "student" / "model.safetensors")


def differences(found: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor: the largest difference between elements, over the reference's largest element."""
    assert set(found) == set(reference)
    return {name: ((found[name] - b).abs().max() / b.abs().max()).item() for name, b in reference.items()}


@pytest.fixture(scope="module")
def on_one_rank(four_rank_config, tmp_path_factory) -> dict[str, Tensor]:
    return train_and_export(four_rank_config, tmp_path_factory.mktemp("one-rank"))


@pytest.mark.distributed
def test_twenty_steps_move_every_exported_tensor_by_far_more_than_layouts_may_differ(
    four_rank_config, on_one_rank, tmp_path
):
    untrained = train_and_export(
        replace(four_rank_config, training=replace(four_rank_config.training, train_iters=0)), tmp_path
    )
    assert len(untrained) == 4 * 9 + 3
    moved = differences(on_one_rank, untrained)
    assert min(moved.values()) > 50 * AGREEMENT, min(moved, key=moved.__getitem__)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks, layout, micro_batch", LAYOUTS)
def test_after_twenty_steps_the_exported_student_is_that_of_one_rank(
    four_rank_config, on_one_rank, tmp_path, ranks, layout, micro_batch
):
    training = replace(four_rank_config.training, micro_batch_size=micro_batch)
    config = replace(on_layout(four_rank_config, **layout), training=training)
    assert_same_student(config, ranks, on_one_rank, tmp_path)


@pytest.mark.distributed
def test_after_twenty_steps_with_full_recomputation_the_exported_student_is_that_of_one_rank(
    four_rank_config, on_one_rank, tmp_path
):
    config = on_layout(four_rank_config, pp=2)
    config.parallel.recompute_granularity = "full"
    assert_same_student(config, 2, on_one_rank, tmp_path)


def assert_same_student(config: Config, ranks: int, reference: dict[str, Tensor], folder: Path) -> None:
    differing = differences(train_and_export(config, folder, ranks), reference)
    worst = max(differing, key=differing.__getitem__)
    assert differing[worst] <= AGREEMENT, worst  # 2e-7 when written
