"""--method tinybert: as logits, and the losses between layers of TinyBERT (arXiv 1909.10351), weighted by --alpha."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lrc.config import TINYBERT_TERMS, ModelShape
from megatron_lrc.methods.logits.method import LogitDistillation
from megatron_lrc.methods.method import CLONE_ONLY


class TinyBert(LogitDistillation):
    has_layer_losses = True
    layer_terms = TINYBERT_TERMS
    is_estimated = False
    foreign_flags = frozenset(CLONE_ONLY - {"alpha"})

    def check_models(self) -> Iterator[str]:
        yield from super().check_models()
        parallel = self.config.parallel
        flags = {
            "--context-parallel-size": parallel.context_parallel_size > 1,
            "--recompute-granularity": parallel.recompute_granularity is not None,
            "--reset-attention-mask": self.config.data.reset_attention_mask,
        }
        if given := " and ".join(flag for flag, is_given in flags.items() if is_given):
            yield (
                f"{given} cannot go with --method tinybert, which compares whole layers and the attention scores of "
                "whole sequences. Leave it out."
            )
        if (groups := self.config.model.student_num_query_groups) is not None:
            yield (
                f"--student-num-query-groups {groups} cannot go with --method tinybert, which compares attention head "
                "by head. Leave it out."
            )

    def num_beside(self, base: ModelShape, student: ModelShape) -> int:
        """The maps of hidden states and embeddings."""
        return (student.num_layers + 1) * base.hidden_size * student.hidden_size

    def terms_of(self, layer: int) -> set[str]:
        """Embeddings are compared where the first layer's losses are counted."""
        return set(TINYBERT_TERMS[layer > 0 :]) if self.config.loss.alpha else set()

    @property
    def title(self) -> str:
        model = self.config.model
        return f"TinyBERT's distillation of {model.teacher} to hidden size {model.student_hidden_size}"
