"""What is trained, and how: a folder per method. The one place where --method is looked up.

`method_of(config)` gives the `Method` (`method.py`) that everybody else asks. Nothing here loads torch; what builds
stages is imported when a run is built.
"""

from megatron_lrc.config import Config
from megatron_lrc.methods.logits.method import LogitDistillation
from megatron_lrc.methods.lrc.method import LowRankClone
from megatron_lrc.methods.method import Method
from megatron_lrc.methods.ordinary.method import OrdinaryTraining
from megatron_lrc.methods.sheared.method import Sheared
from megatron_lrc.methods.tinybert.method import TinyBert

#: --method -> what it means. A new method is a folder and a line here, and its name in `ModelConfig.method`.
METHODS: dict[str, type[Method]] = {
    "lrc": LowRankClone,
    "ordinary": OrdinaryTraining,
    "logits": LogitDistillation,
    "tinybert": TinyBert,
    "sheared": Sheared,
}


def method_of(config: Config) -> Method:
    """What --method of this configuration means."""
    return METHODS[config.model.method](config)


__all__ = ["METHODS", "Method", "method_of"]
