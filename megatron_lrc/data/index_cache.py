"""Builds the index maps of a run before it starts: in one process, without a GPU, teacher or tokenizer.

The run looks for the same folder, since both make the same `Request`. It holds no path: data and maps may be
moved.
"""

import time
from collections.abc import Callable

import numpy

from megatron_lrc.config import Config, ConfigError, check_budget, check_ranges, raise_all
from megatron_lrc.data.blends import plan_data
from megatron_lrc.data.data_checks import check_sizes
from megatron_lrc.data.datasets import Request, resolve_train_iters


def build_index_cache(
    config: Config,
    *,
    step: int = 0,
    consumed_samples: int = 0,
    consumed_tokens: int = 0,
    report: Callable[[str], None],
) -> Request:
    """Fill the cache for a run that has read so many samples and tokens in `step` steps. ConfigError for what it
    refuses."""
    raise_all(list(check_ranges(config)))
    if config.training.global_batch_size is None:
        raise ConfigError(
            "--global-batch-size is missing: its default depends on the number of processes of the run, "
            "which is not known here. Give the run's."
        )
    check_sizes(config)
    plan = plan_data(config)
    if plan.train is None:
        raise ConfigError("There is no data to build maps for. Give --data-path or --train-data-path, as to the run.")
    raise_all(list(check_budget(config.training)))
    place = {"step": step, "consumed_samples": consumed_samples}
    config = resolve_train_iters(config, **place, consumed_tokens=consumed_tokens)
    request = Request.of(config, plan, **place)
    start = time.monotonic()
    was_there = request.fill_cache()
    report(f"{config.train_iters} steps of {config.training.global_batch_size} samples")
    for name in request.orders:
        _describe(request, name, report)
    how = "were there already" if was_there else f"built in {time.monotonic() - start:.1f} s"
    report(f"index maps: {request.folder} ({how})")
    return request


def _describe(request: Request, name: str, report: Callable[[str], None]) -> None:
    order, size = request.orders[name], request.sizes[name]
    what = {"train": "training", "valid": "validation"}[name]
    report(f"{what}: {size} samples of {order.sources[0].seq_length} tokens")
    counts = samples_by_dataset(request, name)
    for source, count in zip(order.sources, counts, strict=True):
        report(
            f"  {source.file.prefix}: {count} samples, {count / source.samples_per_pass:.2f} epochs of "
            f"{source.samples_per_pass} samples ({len(source.documents)} documents, {source.num_tokens} "
            "tokens)"
        )


def samples_by_dataset(request: Request, name: str) -> list[int]:
    """How many of the samples that the run draws come from each dataset. The cache is filled."""
    size, count = request.sizes[name], len(request.orders[name].sources)
    if count == 1:
        return [size]
    datasets = request.load(f"{name}-datasets")
    rounds, rest = divmod(size, len(datasets))
    of_all, of_rest = (numpy.bincount(part, minlength=count) for part in (datasets, datasets[:rest]))
    return (rounds * of_all + of_rest).tolist()
