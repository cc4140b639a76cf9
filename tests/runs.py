"""Runs of a tiny clone: their configuration, training on ranks, and what they have written."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from megatron_lrc.checkpoints.saved_student import open_checkpoint
from megatron_lrc.config import Config, validate
from megatron_lrc.methods import method_of
from megatron_lrc.train import loop
from megatron_lrc.train.start_checks import check
from ranks import run_ranks

#: What differs between two runs that compute the same.
MEASURED = ("time", "step_seconds", "tokens_per_second", "tflops", "mfu", "memory_gib", "straggler")


def make_config(teacher: str, data: str, run: Path, *, steps: int) -> Config:
    """A clone of width 24 on one rank, in 4 micro-batches of 2 sequences; a record of each step, validations."""
    config = Config()
    config.model.teacher, config.model.student_hidden_size = teacher, 24
    config.projection.init_method_std = 0.1
    config.training.seq_length, config.training.micro_batch_size, config.training.global_batch_size = 16, 2, 8
    config.training.train_iters, config.optimizer.lr_decay_iters = steps, 20
    config.optimizer.lr, config.optimizer.lr_warmup_iters = 1e-3, 0  # the first step changes something
    config.data.data_path, config.data.split = [data], "90,10,0"
    config.logging.log_interval, config.logging.eval_iters = 1, 2
    config.checkpoint.save = str(run)
    return config


def on_layout(
    config: Config, *, tp: int = 1, pp: int = 1, cp: int = 1, chunks: int = 1, dist_opt: bool = False
) -> Config:
    """The same run on other ranks; chunks: virtual stages of a pipeline rank."""
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        num_virtual_stages_per_pipeline_rank=chunks if chunks > 1 else None,
        use_distributed_optimizer=dist_opt,
    )
    return replace(config, parallel=parallel)


def continued(config: Config, *, steps: int) -> Config:
    """The same run, gone on from its last checkpoint."""
    return replace(
        config,
        training=replace(config.training, train_iters=steps),
        checkpoint=replace(config.checkpoint, load=config.checkpoint.save),
    )


def saving(config: Config, **flags: object) -> Config:
    """The same run with other values in the configuration's section `checkpoint`."""
    return replace(config, checkpoint=replace(config.checkpoint, **flags))


def saved_in(config: Config, run: Path, **flags: object) -> Config:
    return saving(config, save=str(run), **flags)


def for_steps(config: Config, steps: int) -> Config:
    return replace(config, training=replace(config.training, train_iters=steps))


def train(config: Config, ranks: int = 1) -> None:
    """The whole run, on so many ranks."""
    validate(method_of(config), world_size=ranks)
    run_ranks(ranks, loop.train, config.resolved(ranks))


def make_trainer(config: Config) -> loop.Trainer:
    """On a single rank."""
    checked = check(config, 1)
    return loop.Trainer(checked.config, checked, loop.distributed.start(config))


def records(run: str | Path, name: str = "metrics.jsonl") -> list[dict]:
    """The lines of a file that the run has written."""
    return [json.loads(line) for line in (Path(run) / name).read_text().splitlines()]


def without_times(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def steps_of(run: Path) -> list[int]:
    """Steps on record so far, of a run that may be writing."""
    file = run / "metrics.jsonl"
    return [line["step"] for line in records(run)] if file.exists() and file.read_text().endswith("\n") else []


def checkpoint_names(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("iter_*"))


def assert_same_parameters(first: str | Path, second: str | Path) -> None:
    """The newest checkpoints of two clones have the same projections and gains, bit for bit."""
    one, two = open_checkpoint(str(first)), open_checkpoint(str(second))
    for tensors, others in ((one.projections, two.projections), (one.norms, two.norms)):
        assert set(tensors) == set(others)
        for name in tensors:
            assert torch.equal(tensors[name], others[name]), name


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """Of a student that has weights of its own, by name: the newest checkpoint's."""
    saved = open_checkpoint(str(run)).weights
    assert saved is not None
    return dict(saved)


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = weights_of(first), weights_of(second)
    assert set(one) == set(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def assert_close_weights(first: Path, second: Path, *, within: float) -> None:
    """within: the norm of each weight's difference at most, relative to the weight's own."""
    one, two = weights_of(first), weights_of(second)
    assert set(one) == set(two)
    for name in one:
        assert torch.linalg.norm(two[name] - one[name]) <= within * torch.linalg.norm(one[name]), name


def assert_same_opened_student(first: Path, second: Path) -> None:
    """Two opened clones: projections, gains and the weights of their own."""
    assert_same_parameters(first, second)
    one, two = open_checkpoint(str(first)), open_checkpoint(str(second))
    assert set(one.weights) == set(two.weights)
    for name in one.weights:
        assert torch.equal(one.weights[name], two.weights[name]), name
