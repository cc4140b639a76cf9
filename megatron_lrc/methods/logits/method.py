"""--method logits: a new student, all of it, on the LM and KL losses beside the teacher."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lrc.config import ModelShape, flags_set
from megatron_lrc.methods.method import CLONE_ONLY, Method, Origin
from megatron_lrc.methods.ordinary.method import started_anew


class LogitDistillation(Method):
    #: What this method refuses.
    foreign_flags = frozenset(CLONE_ONLY)

    def check_models(self) -> Iterator[str]:
        yield from super().check_models()
        if given := flags_set(self.config, self.foreign_flags):
            yield f"{given} cannot go with --method {self.name}, which has no projections. Leave it out."

    @property
    def title(self) -> str:
        model = self.config.model
        return f"Distillation of {model.teacher}'s logits to hidden size {model.student_hidden_size}"

    def origin(self, name: str, base: ModelShape, changed_at: int | None) -> Origin:
        story = f"all of its weights, beside\nits teacher `{name}`. {started_anew(name)}"
        return self._trained(name, story, suffix=self.name)
