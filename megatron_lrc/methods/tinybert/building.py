"""The stages of --method logits, with TinyBERT's losses between the layers."""

from megatron_lrc.methods.logits import building as logits
from megatron_lrc.methods.lrc.layer_losses import LayerLosses
from megatron_lrc.methods.lrc.paired_model import PairedModel
from megatron_lrc.methods.method import Materials, Method
from megatron_lrc.methods.tinybert.tinybert_losses import TinyBertLosses


def build_stages(method: Method, materials: Materials) -> list[PairedModel]:
    """With --alpha 0 there are no such losses, and no maps."""
    return logits.build_stages(method, materials, TinyBertLosses if method.config.loss.alpha else LayerLosses)
