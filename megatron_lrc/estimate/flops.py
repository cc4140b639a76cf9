"""FLOPs of one optimizer step by part: what the method needs, counted from the shapes.

Counted are matrix products, 2 FLOPs per multiply-add, as torch's FlopCounterMode counts them
(`tests/distributed/test_flops.py` holds the two against each other). Element-wise work is not, nor is
anything done twice to save memory: recomputed activations, the attention scores that a flash kernel forms
again in backward. That is the convention of model FLOPs utilisation (MFU).

Attention is causal and counted as such: a query meets (s + 1) / 2 keys on average, and in a sliding window no more
than fit into it. FlopCounterMode, and formulas with 12 * layers * hidden * s, count all s. Sequences count as whole
also where --reset-attention-mask attends to documents.

Notation: n tokens, D teacher hidden, d student hidden, s sequence, V vocabulary.
"""

from dataclasses import dataclass, replace

from megatron_lrc.clone.sites import EMBED, LAYER_SITES, LM_HEAD, Site
from megatron_lrc.config import Config, ModelShape
from megatron_lrc.hf.families import site_shape
from megatron_lrc.mcore.gpt_models import padded_vocab_size
from megatron_lrc.methods import Method, method_of


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOPs of one optimizer step over the whole job. Without a teacher (--method ordinary) its parts are 0.

    teacher_forward: with its LM head. student_forward: with its LM head, the projection of the teacher's embeddings of
    the tokens, and the clone loss's products (o_T P_o, o_ffn_T P_down; with --clone-attention-output teacher the
    student's attention through the teacher's o). student_backward: of the same. projections: compose and pull back.
    """

    teacher_forward: float
    student_forward: float
    student_backward: float
    projections: float

    @property
    def total(self) -> float:
        return self.teacher_forward + self.student_forward + self.student_backward + self.projections


def step_flops(
    config: Config, teacher: ModelShape, student: ModelShape, *, replicas: float = 1, has_changed: bool = False
) -> StepFlops:
    """FLOPs of one optimizer step. config: resolved, so that it has its global batch size.

    replicas: model copies (DP x CP) that compose and pull back, each for itself; those that share it count as one. 1
    counts the work that the method needs; the others repeat it. has_changed: whether the method has changed what is
    trained.
    """
    training, method = config.training, method_of(config)
    own = method.own_matrices(has_changed=has_changed or method.changes_at_once)
    assert training.global_batch_size is not None, "the configuration has been resolved"
    tokens = training.global_batch_size * training.seq_length
    through_p = embedding_flops(teacher, student, own)
    clone_forward, clone_backward = (part + through_p for part in _clone_flops(method, teacher, student, own))
    student_layers = layers_flops(student, training.seq_length)
    student_head = head_flops(student)
    teacher_layers = teacher_head = 0.0
    if method.has_teacher:
        teacher_layers = layers_flops(teacher, training.seq_length)
        teacher_head = head_flops(teacher) if config.total_kl_weight else 0.0  # without KL its logits are not made
    return StepFlops(
        teacher_forward=tokens * (teacher_layers + teacher_head),
        student_forward=tokens * (student_layers + student_head + clone_forward),
        student_backward=tokens * (2 * (student_layers + student_head) + clone_backward),
        projections=replicas * projection_flops(config, teacher, student, own),
    )


def layer_flops(shape: ModelShape, keys: float) -> float:
    """Forward FLOPs per token of one layer: its matrices, and the attention of a query to `keys` keys."""
    matrices = sum(_size(site, shape) for site in LAYER_SITES)
    return 2.0 * matrices + 4.0 * shape.num_attention_heads * shape.head_dim * keys


def layers_flops(shape: ModelShape, seq_length: int) -> float:
    """Forward FLOPs per token of all layers."""
    windowed = [layer for layer in range(shape.num_layers if shape.windowed_layers else 0) if shape.window(layer)]
    of_full, of_windowed = (layer_flops(shape, keys_met(seq_length, window)) for window in (None, shape.sliding_window))
    return of_full * (shape.num_layers - len(windowed)) + of_windowed * len(windowed)


def keys_met(seq_length: int, window: int | None = None) -> float:
    """How many keys a query meets on average, itself among them."""
    window = min(window or seq_length, seq_length)
    return window - window * (window - 1) / 2 / seq_length


def head_flops(shape: ModelShape) -> float:
    """Forward FLOPs per token of the LM head, whose padding is left out."""
    return 2.0 * _size(LM_HEAD, shape)


def projection_flops(
    config: Config, teacher: ModelShape, student: ModelShape, own: frozenset[str] = frozenset()
) -> float:
    """FLOPs of one composition and one pull back of every matrix, 2 * |W_T| * d each, of W_T the rows that the student
    keeps; the padded vocabulary's. A tied student's matrix is composed at both ends of a pipeline, an untied one's at
    its end only."""
    parallel, kept = config.parallel, replace(student, hidden_size=teacher.hidden_size)
    elements = sum(_size(site, kept) for site in LAYER_SITES if site.name not in own) * student.num_layers
    if LM_HEAD.name not in own:
        ends = 2 if student.is_tied and parallel.pipeline_model_parallel_size > 1 else 1
        rows = padded_vocab_size(teacher.vocab_size, parallel.tensor_model_parallel_size)
        elements += ends * rows * teacher.hidden_size
    return 2 * 2.0 * elements * student.hidden_size


def embedding_flops(teacher: ModelShape, student: ModelShape, own: frozenset[str]) -> float:
    """Forward FLOPs per token of the teacher's embeddings times P, where the student's matrix is not made; backward
    has as many."""
    is_looked_up = not student.is_tied and EMBED.name not in own
    return 2.0 * teacher.hidden_size * student.hidden_size if is_looked_up else 0.0


def _clone_flops(method: Method, teacher: ModelShape, student: ModelShape, own: frozenset[str]) -> tuple[float, float]:
    """(forward, backward) FLOPs per token of the clone loss's products, all layers together. Backward reaches
    one factor of each: P from the teacher's output, which itself has no gradient; the student's attention
    from the teacher's o, which is frozen."""
    loss, forward, backward = method.config.loss, 0.0, 0.0
    target = 2.0 * teacher.hidden_size * student.hidden_size
    for layer in range(student.num_layers):
        terms = method.terms_of(layer)
        if "o" in terms and loss.clone_attention_output == "teacher":
            through_teacher = 2.0 * teacher.num_attention_heads * teacher.head_dim * teacher.hidden_size
            forward, backward = forward + through_teacher, backward + through_teacher
            terms = terms - {"o"}
        through = terms & {"o", "down"}
        forward += target * len(through)
        backward += 0.0 if loss.detach_clone_targets else target * len(through - own)  # of an own one P is fixed
    return forward, backward


def _size(site: Site, shape: ModelShape) -> int:
    rows, columns = site_shape(site, shape)
    return rows * columns
