"""A tied projection lives on the first and the last stage; both copies must stay the same number for number."""

import pytest
import torch

from megatron_lrc.config import Config
from megatron_lrc.mcore import distributed
from megatron_lrc.train import loop
from megatron_lrc.train.start_checks import check
from ranks import run_ranks
from runs import make_config, on_layout


def tied_projection_after_training(config: Config, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, P before training) of the embedding on this rank. noise: relative, on the last stage's gradient of it."""
    trainer = loop.Trainer(config, check(config, distributed.world_size()), distributed.start(config))
    (matrix,) = [
        matrix for stage in trainer.run.stages for name, matrix in stage.projections.named_matrices() if name == "embed"
    ]
    before = matrix.detach().clone()
    optimizer, is_last = trainer.run.optimizer, trainer.groups.is_last_rank
    reduce_gradients = optimizer.reduce_gradients

    def reduce_with_noise(num_tokens: torch.Tensor) -> None:
        reduce_gradients(num_tokens)
        matrix.main_grad.mul_(1 + noise if is_last else 1)

    optimizer.reduce_gradients = reduce_with_noise
    trainer.train()
    return matrix.detach().clone(), before


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("dist_opt", [False, True], ids=["replicated", "distributed-optimizer"])
def test_a_tied_projection_stays_bit_identical_on_both_ends(tiny_llama, tiny_text, tmp_path, dist_opt):
    """With three replicas: the sum of two numbers does not depend on their order, that of three does."""
    config = make_config(tiny_llama(is_tied=True), tiny_text, tmp_path / "run", steps=12)
    config.training.micro_batch_size, config.training.global_batch_size = 1, 6
    config.checkpoint.save, config.logging.eval_iters, config.logging.log_interval = None, 0, 12
    results = run_ranks(6, tied_projection_after_training, on_layout(config, pp=2, dist_opt=dist_opt).resolved(6))
    trained, before = results[0]
    assert (trained - before).abs().max() > 1e-3
    for other, _ in results[1:]:
        assert torch.equal(other, trained)


@pytest.mark.distributed
@pytest.mark.parametrize("dist_opt", [False, True], ids=["replicated", "distributed-optimizer"])
def test_sums_that_differ_in_their_last_digit_do_not_part_the_ends(tiny_llama, tiny_text, tmp_path, dist_opt):
    """As they may with NCCL and many replicas; here much more than a digit."""
    config = make_config(tiny_llama(is_tied=True), tiny_text, tmp_path / "run", steps=4)
    config.checkpoint.save, config.logging.eval_iters = None, 0
    config = on_layout(config, pp=2, dist_opt=dist_opt).resolved(2)
    (first, _), (last, _) = run_ranks(2, tied_projection_after_training, config, 1e-2)
    assert torch.equal(first, last)
