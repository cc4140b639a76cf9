"""What one rank of a run is, as far as all ranks must be the same: compared before they do anything together.

    settings       every flag's value, but for paths and for what no other rank notices (`per_rank` in `settings`)
    environment    the variables by which libraries choose kernels and algorithms
    packages       versions of those that compute, or read and write what ranks share; Python's
    code           every file of megatron_lrc, whose version number stays the same from commit to commit
    device         GPU or CPU; the kind of GPU is only remarked on
    what lies at paths: the teacher, the data, the checkpoint that is gone on from

Nothing here is collective. Values are short texts, which a message may quote.
"""

import hashlib
import os
import platform
from pathlib import Path

import torch

import megatron_lrc
from megatron_lrc.checkpoints.index import COMMON_FILE, INDEX_FILE
from megatron_lrc.checkpoints.run_directory import STATE_FILE
from megatron_lrc.config import SETTINGS, Config, flag_of
from megatron_lrc.data.blends import plan_data
from megatron_lrc.data.data_checks import flags_that_need_eod
from megatron_lrc.data.datasets import tokenizer_identity
from megatron_lrc.data.identity import describe_data
from megatron_lrc.hf.content_hash import root_of
from megatron_lrc.hf.sampled_hash import is_sampled
from megatron_lrc.hf.teacher_identity import short
from megatron_lrc.mcore.kernels import engine_version
from megatron_lrc.train.start_checks import Checked
from megatron_lrc.train.starts import version_of

_PACKAGES = ("torch", "megatron-core", "apex", "numpy", "transformers", "safetensors")
#: Beside those of Transformer Engine (NVTE_...) but paths and its debug output.
_VARIABLES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "NCCL_ALGO",
    "NCCL_PROTO",
)
_SHOWN = 16  # hexadecimal digits of a sha256


def describe_rank(checked: Checked, world_size: int) -> dict[str, str]:
    """Name, as the user knows it -> value."""
    config = checked.config
    return {
        "the number of processes (WORLD_SIZE)": str(world_size),
        **describe_settings(config),
        **_describe_environment(),
        **_describe_packages(),
        "the device": "a GPU" if torch.cuda.is_available() else "the CPU",
        f"what lies at --{config.base_role.noun}": _describe_base(checked),
        **describe_data(config),
        **_describe_tokenizer(config),
        **describe_checkpoints(checked),
        **_describe_code(Path(megatron_lrc.__file__).parent),
    }


def describe_device() -> str:
    """The kind of GPU, which had better be the same everywhere."""
    return torch.cuda.get_device_name(int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "CPU"


def describe_settings(config: Config) -> dict[str, str]:
    """What ranks must have alike: values, and whether there is a run directory to write, wherever it lies."""
    compared = [setting for setting in SETTINGS.values() if setting.per_rank is None]
    values = {flag_of(setting.name): getattr(getattr(config, setting.section), setting.name) for setting in compared}
    texts = {flag: "not given" if value is None else str(value) for flag, value in values.items()}
    return {**texts, "--save": "given" if config.checkpoint.save else "not given"}


def describe_checkpoints(checked: Checked) -> dict[str, str]:
    """Those that the run goes on from, or takes weights from."""
    return {
        "the checkpoint to go on from": _describe_checkpoint(checked.resume_from),
        "what lies at --pretrained-checkpoint": _describe_checkpoint(checked.weights_from),
    }


def _describe_checkpoint(path: Path | None) -> str:
    """Its step, and a digest of run.json and the index. In run.json are the counters and the sizes and sums of all
    files: the sizes have been looked at (`find_checkpoint`), the sums all ranks together will compare."""
    if path is None:
        return "none"
    digest = hashlib.sha256()
    for name in (STATE_FILE, INDEX_FILE, COMMON_FILE):
        digest.update((path / name).read_bytes() if (path / name).is_file() else b"")
    return f"{path.name} {digest.hexdigest()[:_SHOWN]}"


def _describe_base(checked: Checked) -> str:
    """By every byte of the weights and config.json; by that alone where the weights come from a checkpoint.

    ConfigError where a converted model's files are not what the conversion wrote.
    """
    if not checked.contents:
        return short(checked.teacher.config_fingerprint)
    found = checked.reader.fingerprint(checked.contents)
    return short(root_of(checked.teacher.config_values, checked.contents) if is_sampled(found) else found)


def _describe_environment() -> dict[str, str]:
    engine = [name for name, value in os.environ.items() if name.startswith("NVTE_") and os.sep not in value]
    compared = [*_VARIABLES, *sorted(name for name in engine if not name.startswith("NVTE_DEBUG"))]
    return {name: os.environ.get(name, "not set") for name in compared}


def _describe_packages() -> dict[str, str]:
    versions = {package: version_of(package) for package in _PACKAGES}
    versions["transformer-engine"] = engine_version()
    versions["Python"] = ".".join(platform.python_version_tuple()[:2])
    return {package: version or "not installed" for package, version in versions.items()}


def _describe_tokenizer(config: Config) -> dict[str, str]:
    """Where a training uses one: for what it takes for the end of a document."""
    plan = plan_data(config)
    if plan.train is None or not flags_that_need_eod(config):
        return {}
    tokenizer = tokenizer_identity(config, plan)
    return {"the tokenizer": f"{tokenizer.fingerprint[:_SHOWN]}, end of document {tokenizer.eod}"}


def _describe_code(package: Path) -> dict[str, str]:
    files = sorted(package.rglob("*.py"))
    return {
        f"{package.name}/{file.relative_to(package).as_posix()}": hashlib.sha256(file.read_bytes()).hexdigest()[:_SHOWN]
        for file in files
    }
