"""A run's training and validation datasets: megatron-core's GPTDataset in the order of `sample_order.py`.

The maps from samples to documents are cached: each request (data, order, how many samples) in a folder named
by a hash over all of it, the .idx bytes included. So data written anew under an old prefix cannot meet stale
maps, and maps built elsewhere are found. Rank 0 fills the folder under a temporary name: one which exists is
complete. It holds the maps' checksums, against which rank 0 reads all of them before a run uses them.
"""

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar
from uuid import uuid4

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from megatron_lrc.config import Config, ConfigError, count_steps
from megatron_lrc.data.blends import Blend, DataPlan, plan_data
from megatron_lrc.data.checksums import check_checksums, write_checksums
from megatron_lrc.data.data_checks import flags_that_need_eod
from megatron_lrc.data.indexed_files import identity_of, read_indexed_file
from megatron_lrc.data.loaded_tokenizer import TokenizerIdentity
from megatron_lrc.data.mapped_files import map_array
from megatron_lrc.data.sample_order import SampleOrder, digest_of
from megatron_lrc.data.tokenizers import load_tokenizer
from megatron_lrc.os_errors import explain

T = TypeVar("T")


def build_datasets(
    config: Config, *, step: int = 0, consumed_samples: int = 0
) -> tuple["OrderedDataset | None", "OrderedDataset | None"]:
    """The training and validation datasets; None where the flags give none. Collective: every rank calls it.

    `check_data` has passed. The training dataset holds at least the samples of the calibration and those up
    to --train-iters, for a run that has read `consumed_samples` in `step` steps.
    """
    plan = plan_data(config)
    if plan.train is None:
        return None, None
    request = Request.of(config, plan, step=step, consumed_samples=consumed_samples)
    request.fill_cache()
    return request.open(config, plan)


def first_samples(config: Config, count: int) -> dict[str, Tensor]:
    """tokens, labels, loss_mask: the first samples of a run's training data, each [count, seq_length].

    `check_data` has passed. Whatever budget and batch the run has, it begins with these.
    """
    training = replace(config.training, train_iters=count, global_batch_size=1)
    dataset, _ = build_datasets(replace(config, training=training))
    assert dataset is not None, "check_data() has passed"
    samples = [dataset[index] for index in range(count)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels", "loss_mask")}


def resolve_train_iters(
    config: Config, *, step: int = 0, consumed_samples: int = 0, consumed_tokens: int = 0
) -> Config:
    """A copy in which another budget than --train-iters is counted in steps; else the same Config.

    `step`, `consumed_samples`, `consumed_tokens`: where a resumed run stands, which takes what is left of its budget,
    whatever its batch size was. --train-tokens and --train-samples: `config.budget.count_steps`. --train-epochs: an
    epoch is one pass over every training dataset (`sample_order.py`): each token is an input once, and a label once.
    Left out are the tokens after a dataset's last whole sample (at most seq_length, other ones in each pass), and at
    the end of the run the samples that fill no global batch.
    """
    place = {"step": step, "consumed_samples": consumed_samples, "consumed_tokens": consumed_tokens}
    if (steps := count_steps(config.training, **place)) is not None:
        return replace(config, training=replace(config.training, train_iters=steps))
    num_epochs, batch_size = config.training.train_epochs, config.training.global_batch_size
    plan = plan_data(config)
    if not num_epochs or plan.train is None:
        return config
    assert batch_size is not None, "the configuration has been resolved"
    order = _order_of(plan.train, plan.train_part, config)
    if plan.train.weights:
        raise ConfigError(
            f"--train-epochs {num_epochs} passes over every dataset equally often, which the weights of "
            f"{plan.train.flag} contradict. Leave the weights out, or give --train-tokens instead."
        )
    num_samples = num_epochs * order.samples_per_pass
    if num_samples < consumed_samples:
        raise ConfigError(
            f"--train-epochs {num_epochs} is {num_samples} samples, but the checkpoint of --load has read "
            f"{consumed_samples}. Use more epochs to train further."
        )
    train_iters = step + (num_samples - consumed_samples) // batch_size
    if train_iters == 0:
        raise ConfigError(
            f"--train-epochs {num_epochs} is {num_samples} samples, and one step takes --global-batch-size "
            f"{batch_size}. Use more epochs or a smaller batch."
        )
    return replace(config, training=replace(config.training, train_iters=train_iters))


def num_calibration_batches(config: Config) -> int:
    """Global batches that calibration reads: the first ones of the training data."""
    if not config.calibrations:
        return 0
    assert config.training.global_batch_size is not None
    return math.ceil(
        config.projection.calibration_tokens / (config.training.seq_length * config.training.global_batch_size)
    )


@dataclass(frozen=True, kw_only=True)
class Request:
    """The maps that a run needs, and the folder where they are kept."""

    orders: dict[str, SampleOrder]  # "train", and "valid" if there is any
    sizes: dict[str, int]  # samples that are drawn of each
    parent: str

    @classmethod
    def of(cls, config: Config, plan: DataPlan, *, step: int = 0, consumed_samples: int = 0) -> "Request":
        assert plan.train is not None
        batch_size = config.training.global_batch_size
        assert batch_size is not None, "the configuration has been resolved before datasets are built"
        orders = {"train": _order_of(plan.train, plan.train_part, config)}
        ahead = max(config.train_iters - step, 0) * batch_size
        sizes = {"train": max(consumed_samples + ahead, max(num_calibration_batches(config), 1) * batch_size)}
        if plan.valid:
            orders["valid"] = _order_of(plan.valid, plan.valid_part, config)
            sizes["valid"] = config.logging.eval_iters * batch_size
        return cls(
            orders=orders,
            sizes=sizes,
            parent=config.data.data_cache_path or os.path.join(os.path.dirname(plan.train.prefixes[0]), "cache"),
        )

    @cached_property
    def reaches(self) -> dict[str, int]:
        """Samples that each one's maps reach to."""
        return {name: order.reach(self.sizes[name]) for name, order in self.orders.items()}

    @cached_property
    def folder(self) -> str:
        parts = [[name, order.identity, self.reaches[name]] for name, order in self.orders.items()]
        return os.path.join(self.parent, digest_of(["with checksums and name", *parts]))

    def fill_cache(self) -> bool:
        """Have the maps built by rank 0 unless they are there: whether they were. Collective; ConfigError alike.

        Maps that are there are checked by their checksums; damaged ones are refused.
        """
        _require_compiled_helpers()
        return _on_first_rank(self._fill_cache)

    def _fill_cache(self) -> bool:
        folder = self.folder
        temporary = f"{folder}.tmp-{uuid4().hex}"
        try:
            os.makedirs(self.parent, exist_ok=True)
            if os.path.isdir(folder):
                check_checksums(folder)
                return True
            try:
                self.write_maps(temporary)
                write_checksums(temporary, name=os.path.basename(folder))
                with contextlib.suppress(OSError):  # another run has just finished the same folder: use that one
                    os.rename(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise ConfigError(
                f"The dataset's index maps cannot be kept in {self.parent}: {explain(error)} Give --data-cache-path a "
                "folder that can be written and that every node sees."
            ) from error
        return False

    def write_maps(self, folder: str) -> None:
        os.makedirs(folder)
        for name, order in self.orders.items():
            blending = order.blending(self.reaches[name])
            for kind, numbers in zip(("datasets", "numbers"), blending or (), strict=False):
                numpy.save(os.path.join(folder, f"{name}-{kind}.npy"), numbers)
            passes = order.passes(self.reaches[name], blending and blending[0])
            for index, (source, num_passes) in enumerate(zip(order.sources, passes, strict=True)):
                for kind, numbers in source.maps(order.seed, num_passes).items():
                    numpy.save(os.path.join(folder, f"{name}-{index}-{kind}.npy"), numbers)

    def open(self, config: Config, plan: DataPlan) -> tuple["OrderedDataset", "OrderedDataset | None"]:
        """The datasets, from a filled cache."""
        from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

        from megatron_lrc.data.passes import RepeatedDataset

        prefixes = [source.file.prefix for source in self.orders["train"].sources]
        gpt_config = GPTDatasetConfig(
            random_seed=config.training.seed,
            sequence_length=config.training.seq_length,
            blend_per_split=[(prefixes, None), None, None],  # or it would take itself for mock data
            tokenizer=tokenizer_identity(config, plan),  # type: ignore[arg-type]
            reset_position_ids=config.data.reset_position_ids or config.data.reset_attention_mask,
            reset_attention_mask=False,  # made of the position ids, in mcore/attention.py
            eod_mask_loss=config.data.eod_mask_loss,
            create_attention_mask=False,
        )

        def open_order(name: str) -> OrderedDataset:
            order, datasets = self.orders[name], []
            for index, source in enumerate(order.sources):
                maps = {kind: self.load(f"{name}-{index}-{kind}") for kind in ("documents", "samples", "shuffle")}
                datasets.append(
                    RepeatedDataset(
                        source.file,
                        source.documents,
                        maps,
                        gpt_config,
                        masks_last_label=config.data.mask_last_label,
                        train_on_inputs=config.data.train_on_inputs,
                    )
                )
            is_blend = len(datasets) > 1
            blending = (self.load(f"{name}-datasets"), self.load(f"{name}-numbers")) if is_blend else None
            return OrderedDataset(order, self.reaches[name], datasets, blending)

        return open_order("train"), open_order("valid") if "valid" in self.orders else None

    def load(self, name: str) -> numpy.ndarray:
        """An array of the filled cache, memory-mapped; objects would be pickles. ConfigError for anything else."""
        path = os.path.join(self.folder, f"{name}.npy")
        try:
            array = numpy.load(path, mmap_mode="r")  # which looks at its header, and keeps a descriptor
            return map_array(path, array.dtype, array.shape, array.offset)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{path} is not there, where rank 0 should have written it: ranks that have their data in folders of "
                "their own need one for the index maps that all see. Give it with --data-cache-path."
            ) from error
        except OSError as error:
            raise ConfigError(explain(error, path)) from error
        except (ValueError, EOFError, AttributeError) as error:  # AttributeError: no array, but an archive of them
            raise ConfigError(
                f"{path} is not an index map ({error}). Remove {self.folder}; the next start builds it again."
            ) from error


class OrderedDataset(Dataset[dict[str, Tensor]]):
    """The first samples of an order: tokens, labels, position_ids, loss_mask, each [seq_length]."""

    def __init__(
        self,
        order: SampleOrder,
        size: int,
        datasets: list[Dataset],
        blending: tuple[numpy.ndarray, numpy.ndarray] | None,
    ):
        self.order, self._size, self._datasets, self._blending = order, size, datasets, blending

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        which, number = self.place(index)
        return self._datasets[which][number]

    def place(self, index: int) -> tuple[int, int]:
        """Sample `index` as (dataset, number there), both from 0. The number counts on from pass to pass."""
        if not 0 <= index < self._size:
            raise IndexError(index)
        if self._blending is None:
            return 0, index
        datasets, numbers = self._blending
        round_number, place = divmod(index, len(datasets))
        which = int(datasets[place])
        return which, int(numbers[place]) + round_number * self.order.sources[which].samples_per_pass


def _order_of(blend: Blend, part: tuple[float, float], config: Config) -> SampleOrder:
    return SampleOrder.of(blend, part, seq_length=config.training.seq_length, seed=config.training.seed)


def tokenizer_identity(config: Config, plan: DataPlan) -> TokenizerIdentity:
    """Of the manifest where there is one, else loaded if its end-of-document id is needed, else unknown."""
    assert plan.train is not None
    manifest = read_indexed_file(plan.train.prefixes[0]).manifest
    if manifest:
        return identity_of(manifest)
    if flags_that_need_eod(config):
        path = config.data.tokenizer_model or config.base_model
        assert path is not None
        return load_tokenizer(path)
    return TokenizerIdentity(fingerprint="unknown", vocab_size=0, eod=None)


def _on_first_rank(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, or its ConfigError, on every rank; alone without a process group."""
    if not dist.is_initialized():
        return work()
    answer: list[T | ConfigError | None] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [work()]
        except ConfigError as error:
            answer = [ConfigError(str(error))]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], ConfigError):
        raise answer[0]
    return answer[0]  # type: ignore[return-value]


def _require_compiled_helpers() -> None:
    import megatron_lrc.mcore  # noqa: F401  before megatron-core, which a broken Transformer Engine would break

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError as error:
        import megatron.core

        raise ConfigError(
            f"megatron-core {megatron.core.__version__} has no compiled dataset helpers for this Python "
            f"{sys.version_info.major}.{sys.version_info.minor} ({error}). Install its wheel for this Python "
            "(pip install --force-reinstall --no-deps megatron-core), or use Python 3.10 to 3.13."
        ) from error
