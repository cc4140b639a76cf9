"""What a training with some configuration would be refused for on this machine."""

from benchmarks.gpu_check.checks import Skip
from benchmarks.gpu_check.machine import need_engine
from benchmarks.gpu_check.settings import Settings
from megatron_lrc.config import Config, ConfigError, check_precision, raise_all
from megatron_lrc.mcore.kernels import check_machine


def need_support(settings: Settings, config: Config) -> None:
    """Skip, with the message of the refusal. But a Transformer Engine that is missing is an error (`need_engine`)."""
    compute = config.compute
    if compute.fp8_format is not None or compute.transformer_impl == "transformer_engine":
        need_engine(settings)
    try:
        raise_all(list(check_precision(config)))
        check_machine(config)
    except ConfigError as refusal:
        raise Skip(f"refused: {refusal}") from None
