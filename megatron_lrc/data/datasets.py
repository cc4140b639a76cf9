"""A run's training and validation datasets: megatron-core's GPTDataset, blended where several prefixes are given.

megatron-core caches the maps from samples to documents. Here each request (data, sizes, seed, length, split) has a
folder of its own, named by a hash over all of it, the .idx bytes included: data written anew under an old prefix cannot
meet stale maps. Rank 0 fills the folder under a temporary name, so that one which exists is complete.

The order of samples follows from seed, data and the number of samples asked for: GPTDataset shuffles all epochs but
the last together. The number is a function of the configuration alone; changing --train-iters can change the order if
the data is passed over more than once.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from torch.utils.data import Dataset

from megatron_lrc.config import Config, ConfigError
from megatron_lrc.data.checks import Blend, DataPlan, identity_of, plan_data, read_indexed_file
from megatron_lrc.data.tokenizers import TokenizerIdentity, load_tokenizer


def build_datasets(config: Config) -> tuple[Dataset | None, Dataset | None]:
    """The training and validation datasets; None where the flags give none. Collective: every rank calls it.

    `check_data` has passed. The training dataset holds at least the samples of --train-iters and of the calibration.
    """
    plan = plan_data(config)
    if plan.train is None:
        return None, None
    _require_compiled_helpers()
    request = _Request.of(config, plan)
    folder = os.path.join(
        config.data.data_cache_path or os.path.join(os.path.dirname(plan.train.prefixes[0]), "cache"), request.digest()
    )
    with _process_group():
        if not _is_cached(folder):
            _fill_cache(request, folder)
        train, valid, _ = request.build(folder, is_built_on_rank=lambda: True)
    return train, valid


def num_calibration_batches(config: Config) -> int:
    """Global batches that --init pca reads: the first ones of the training data."""
    if config.projection.init != "pca":
        return 0
    assert config.training.global_batch_size is not None
    return math.ceil(
        config.projection.calibration_tokens / (config.training.seq_length * config.training.global_batch_size)
    )


@dataclass(frozen=True, kw_only=True)
class _Request:
    """Everything that decides what megatron-core builds."""

    plan: DataPlan
    sizes: tuple[int, int]  # samples of training and validation
    seq_length: int
    seed: int
    eod_mask_loss: bool
    tokenizer: TokenizerIdentity

    @classmethod
    def of(cls, config: Config, plan: DataPlan) -> "_Request":
        batch_size = config.training.global_batch_size
        assert batch_size is not None, "the configuration has been resolved before datasets are built"
        num_batches = max(config.training.train_iters, num_calibration_batches(config), 1)
        return cls(
            plan=DataPlan(
                train=_with_weights(plan.train),
                valid=_with_weights(plan.valid),
                train_part=plan.train_part,
                valid_part=plan.valid_part,
            ),
            sizes=(num_batches * batch_size, config.logging.eval_iters * batch_size),
            seq_length=config.training.seq_length,
            seed=config.training.seed,
            eod_mask_loss=config.data.eod_mask_loss,
            tokenizer=_tokenizer_identity(config, plan),
        )

    def digest(self) -> str:
        """Hash over the request, the .idx files (which alone decide the maps) and megatron-core's version."""
        from megatron.core import __version__ as megatron_version

        blends = [blend for blend in (self.plan.train, self.plan.valid) if blend]
        digest = hashlib.sha256(json.dumps([asdict(self), megatron_version], sort_keys=True).encode())
        for prefix in dict.fromkeys(prefix for blend in blends for prefix in blend.prefixes):
            with open(f"{prefix}.idx", "rb") as file:
                while piece := file.read(1 << 24):
                    digest.update(piece)
        return digest.hexdigest()[:32]

    def build(self, cache: str, *, is_built_on_rank: Callable[[], bool]) -> list[Any]:
        """[training, validation, test (always None)] from megatron-core, with its maps in `cache`."""
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        train, valid = (_as_megatron_blend(blend) for blend in (self.plan.train, self.plan.valid))
        assert self.plan.train is not None
        is_split = self.plan.train.flag == "--data-path"
        dataset_config = GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.seq_length,
            blend=train if is_split else None,
            blend_per_split=None if is_split else [train, valid, None],
            split="1,0,0" if is_split else None,
            path_to_cache=cache,
            tokenizer=self.tokenizer,  # type: ignore[arg-type]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=self.eod_mask_loss,
            create_attention_mask=False,
            mid_level_dataset_surplus=self._surplus(),
        )
        if is_split:
            # The parts as checked. No test part: where it rounds to no document, GPTDataset would count epochs forever.
            dataset_config.split_matrix = [self.plan.train_part, self.plan.valid_part if valid else None, None]  # type: ignore[list-item]
        return BlendedMegatronDatasetBuilder(GPTDataset, [*self.sizes, 0], is_built_on_rank, dataset_config).build()

    def _surplus(self) -> float:
        """Extra samples to build of each dataset in a blend, as a fraction.

        megatron-core blends sum_i ceil(size * w_i) samples but builds ceil(size * w_i) * (1 + surplus) of dataset i.
        With its default of 0.005, a small size and uneven weights ask for more than there are: an IndexError on rank 0.
        """
        surplus = 0.005
        for blend, size in zip((self.plan.train, self.plan.valid), self.sizes, strict=True):
            if blend and blend.weights and size:
                targets = [math.ceil(size * weight / sum(blend.weights)) for weight in blend.weights]
                for target, weight in zip(targets, blend.weights, strict=True):
                    most = sum(targets) * weight / sum(blend.weights) + 2  # blending keeps within one of proportion
                    surplus = max(surplus, most / target - 1)
        return surplus


def _with_weights(blend: Blend | None) -> Blend | None:
    """Several prefixes without weights: by tokens. megatron-core itself would stop after one pass over the data."""
    if blend is None or len(blend.prefixes) == 1:
        return blend and Blend(flag=blend.flag, prefixes=blend.prefixes, weights=None)
    weights = blend.weights or [float(read_indexed_file(prefix).num_tokens) for prefix in blend.prefixes]
    return Blend(flag=blend.flag, prefixes=blend.prefixes, weights=weights)


def _as_megatron_blend(blend: Blend | None) -> tuple[list[str], list[float] | None] | None:
    return (blend.prefixes, blend.weights) if blend else None


def _tokenizer_identity(config: Config, plan: DataPlan) -> TokenizerIdentity:
    """Of the manifest where there is one, else loaded if its end-of-document id is needed, else unknown."""
    assert plan.train is not None
    manifest = read_indexed_file(plan.train.prefixes[0]).manifest
    if manifest:
        return identity_of(manifest)
    if config.data.eod_mask_loss:
        path = config.data.tokenizer_model or config.model.teacher
        assert path is not None
        tokenizer = load_tokenizer(path)
        return TokenizerIdentity(fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod)
    return TokenizerIdentity(fingerprint="unknown", vocab_size=0, eod=None)


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """The run's process group, or one of a single process: megatron-core 0.16's BlendedDataset always wants a rank."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()


def _is_cached(folder: str) -> bool:
    """Whether the folder is there, as rank 0 sees it; makes its parent. The same answer or error on every rank."""
    answer: list[bool | str] = [False]
    if dist.get_rank() == 0:
        try:
            os.makedirs(os.path.dirname(folder), exist_ok=True)
            answer = [os.path.isdir(folder)]
            if not os.path.isdir(folder) and not os.access(os.path.dirname(folder), os.W_OK):
                answer = ["it is not writable"]
        except OSError as error:
            answer = [str(error.strerror)]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise ConfigError(
            f"The dataset's index maps cannot be kept in {os.path.dirname(folder)} ({answer[0]}). Give "
            "--data-cache-path a folder that can be written and that every node sees."
        )
    return answer[0]


def _fill_cache(request: _Request, folder: str) -> None:
    """Rank 0 builds the maps under a temporary name, then renames it; the others wait in megatron-core's barriers."""
    is_rank_0 = dist.get_rank() == 0
    temporary = f"{folder}.tmp-{os.getpid()}"
    try:
        request.build(temporary, is_built_on_rank=lambda: is_rank_0)
        if is_rank_0:
            with contextlib.suppress(OSError):  # another run has just finished the same folder: use that one
                os.rename(temporary, folder)
    finally:
        if is_rank_0:
            shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()


def _require_compiled_helpers() -> None:
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError as error:
        import megatron.core

        raise ConfigError(
            f"megatron-core {megatron.core.__version__} has no compiled dataset helpers for this Python "
            f"{sys.version_info.major}.{sys.version_info.minor} ({error}). Install its wheel for this Python "
            "(pip install --force-reinstall --no-deps megatron-core), or use Python 3.10, 3.11 or 3.12."
        ) from error
