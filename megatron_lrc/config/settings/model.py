"""What is trained: teacher and student, the method and its parts, and the loss. See the package's docstring."""

from dataclasses import dataclass
from typing import Literal

from .setting import setting

#: The terms of the clone loss: the seven matrices of a layer.
CLONE_TERMS = ("q", "k", "v", "o", "gate", "up", "down")
#: Those of --method tinybert: the embeddings, and of each layer its hidden states and attention scores.
TINYBERT_TERMS = ("embedding", "hidden", "attention")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Teacher and student."""

    method: Literal["lrc", "ordinary", "logits", "tinybert", "sheared"] = setting(
        "lrc",
        "lrc: the student is a low-rank clone of --teacher. ordinary: the student alone is trained, all of it, on the "
        "LM loss; from --student on, or anew (--init-method-std), shaped by --teacher's config.json and "
        "--student-hidden-size. logits: such a new student, all of it, on the LM and KL losses beside --teacher. "
        "tinybert: the same, and --alpha times the losses of TinyBERT (arXiv 1909.10351): hidden states and embeddings "
        "through learned maps, attention scores. sheared: --teacher itself is trained, on the LM loss, and pruned to "
        "--student-hidden-size on the way (Sheared-LLaMA, arXiv 2310.06694).",
    )
    student: str | None = setting(
        None,
        "With --method ordinary: the model to train, a Hugging Face directory or one that tools/convert_from_hf.py "
        "wrote, instead of --teacher and --student-hidden-size.",
        metavar="DIR",
        per_rank="path",
    )
    teacher: str | None = setting(
        None,
        "Frozen teacher: a Hugging Face directory (config.json, *.safetensors, tokenizer), or one that "
        "tools/convert_from_hf.py wrote.",
        required=True,
        metavar="DIR",
        per_rank="path",
    )
    student_hidden_size: int | None = setting(
        None, "Hidden size d_S of the student, in features; below the teacher's d_T.", at_least=1, required=True
    )
    student_num_layers: int | None = setting(
        None,
        "Layers of the student: that many of the teacher's, evenly spread, the first and the last among them. Default: "
        "all of them.",
        at_least=1,
    )
    student_layers: list[str] = setting(
        [],
        "Or which ones: layers of the teacher (from 0) that the student's are made of and compared with, in rising "
        "order: 0 1 3 5-11. The teacher runs all of its layers.",
        metavar="LAYERS",
    )
    student_num_query_groups: int | None = setting(
        None,
        "KV groups that each layer of the student keeps of the teacher's, with their query heads: those that add most "
        "to the residual stream. Default: all of them.",
        at_least=1,
    )
    student_ffn_hidden_size: int | None = setting(
        None,
        "FFN neurons that each layer of the student keeps of the teacher's, in gate, up and down alike: those that "
        "add most to the residual stream. Default: all of them.",
        at_least=1,
    )
    student_norm_epsilon: float | None = setting(
        None,
        "Epsilon of the student's RMSNorms, in training and in the exported config.json. Default: the teacher's. The "
        "released code trains every student with 1e-5.",
        above=0,
    )
    untie_embeddings_and_output_weights: bool | None = setting(
        None,
        "Give the student's LM head a projection of its own. Default: untied if the teacher is untied or with any "
        "--init but random (whose closed forms need two projections), else tied.",
    )


@dataclass(kw_only=True, slots=True)
class ProjectionConfig:
    """How the projections P start, and when they are dropped."""

    init: Literal["random", "orthogonal", "channel", "pca", "ridge", "released"] = setting(
        "random",
        "random: every P ~ N(0, --init-method-std) (the released code). The others start from one basis of the "
        "teacher's residual stream in closed form. orthogonal: a random one; channel: the most active channels; pca: "
        "the principal directions; ridge: those, then each P in front of a matrix fitted to the teacher's activations. "
        "released: from --released-checkpoint.",
    )
    released_checkpoint: str | None = setting(
        None,
        "Of --init released: a training checkpoint of the code that was released with the paper, the directory with "
        "config.json and its zoom matrices in safetensors. Its optimizer's state is not read.",
        metavar="DIR",
        per_rank="path",
    )
    init_method_std: float = setting(
        0.02,
        "Standard deviation of --init random; and of a new model's matrices with every --method but lrc, for o "
        "and down divided by the square root of twice the number of layers.",
        above=0,
    )
    calibration_tokens: int = setting(
        65536,
        "Training tokens that --init channel, pca and ridge and --clone-normalization token run through the teacher.",
        at_least=1,
    )
    open_after: float | None = setting(
        None,
        "After so many steps (below 1: that fraction of all), drop the projections of --open-matrices: the "
        "student's own matrices, which they have made, are trained from there on, on the same losses. 0: before the "
        "first step, so that projections make nothing but the start. Default: never.",
        at_least=0,
    )
    open_matrices: Literal["mlp", "all"] = setting(
        "mlp", "What --open-after opens. mlp: gate, up and down; all: every matrix, q, k and v biases, q and k norms."
    )
    open_lr: float | None = setting(
        None,
        "Peak learning rate from --open-after on, in the same schedule. Default: --lr; with --lr auto what its rule "
        "says of opened students.",
        above=0,
    )

    @property
    def is_closed_form(self) -> bool:
        """Whether P follows from a basis: then embedding and LM head have a P each, and d <= D."""
        return self.init not in ("random", "released")

    @property
    def is_calibrated(self) -> bool:
        """Whether it takes training tokens."""
        return self.init in ("channel", "pca", "ridge")


@dataclass(kw_only=True, slots=True)
class PruningConfig:
    """--method sheared: masks are learnt together with the weights, then the model is cut and trained on."""

    pruned_num_query_groups: int | None = setting(
        None, "KV groups that are kept in each layer, with their query heads. Default: the teacher's.", at_least=1
    )
    pruned_ffn_hidden_size: int | None = setting(
        None, "FFN neurons that are kept in each layer. Default: the teacher's.", at_least=1
    )
    prune_after: float = setting(0.3, "Cut the model after so many steps (below 1: that fraction of all).", above=0)
    mask_lr: float = setting(
        1.0, "Learning rate of the masks and of their Lagrange multipliers, which have an Adam of their own.", above=0
    )


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """L = lm_weight * L_LM + kl_weight * L_KL + alpha * L_clone."""

    alpha: float = setting(
        0.2, "Weight of the activation-clone loss, or of --method tinybert's losses; 0 turns it off.", at_least=0
    )
    lm_weight: float = setting(1.0, "Weight of the language-modelling loss; 0 turns it off.", at_least=0)
    kl_weight: float = setting(
        1.0, "Weight of tau^2 * KL(teacher || student), mean over tokens; 0 turns it off.", at_least=0
    )
    kl_divergence: str = setting(
        "forward",
        "forward: KL(teacher || student); reverse: KL(student || teacher); jsd:BETA: BETA KL(teacher || mixture) + "
        "(1 - BETA) KL(student || mixture), the mixture with BETA of the teacher. Whichever it is, records call it KL.",
        metavar="forward|reverse|jsd:BETA",
    )
    kl_top_k: int | None = setting(
        None,
        "Compare the teacher's likeliest so many tokens, and all others as one. The teacher's probability within them, "
        "at the temperature, is in every record.",
        at_least=1,
    )
    kl_reduction: Literal["mean", "sequence-sum"] = setting(
        "mean",
        "mean: over tokens, times tau^2; sequence-sum: over the tokens of a sequence, then the mean over sequences, "
        "without tau^2 (the released code), which is --seq-length / tau^2 times the other.",
    )
    kl_temperature: float = setting(
        40.0, "Temperature tau of both distributions in the KL loss. With --kl-top-k: 1, unless given.", above=0
    )
    clone_terms: list[str] = setting(
        list(CLONE_TERMS),
        "Terms of the clone loss, each with the layers it covers (from 0) if not all: q k v o gate:0-13 up:4,8-11.",
        metavar="TERM[:LAYERS]",
    )
    clone_attention_output: Literal["student", "teacher"] = setting(
        "student",
        "Width at which the o term compares. student: E(o_S, o_T P_o). teacher: the student's attention through the "
        "teacher's o matrix with o_T (the released code), which gives P_o no clone gradient.",
    )
    clone_normalization: Literal["none", "token"] = setting(
        "none",
        "none: squared errors as they are (the paper). token: each token's, divided by the mean square of its own "
        "target, or by the site's typical one where that is larger, and from 1 on as Huber's loss: teachers and "
        "students have tokens of massive activations, which otherwise are most of the loss.",
    )
    detach_clone_targets: bool = setting(
        False, "Keep the targets o_T P_o and o_ffn_T P_down from passing gradients to their projection."
    )
    loss_chunk_tokens: int | None = setting(
        None,
        "Tokens whose logits exist at once in the LM and KL losses. Default: 512 on a CPU, 2,048 on a GPU, where each "
        "chunk reads and writes the head's whole gradient.",
        at_least=1,
    )

    def chunk_tokens(self, *, on_cuda: bool) -> int:
        return self.loss_chunk_tokens or (2048 if on_cuda else 512)

    @property
    def is_relative(self) -> bool:
        """Whether clone losses are divided by the teacher's energies, which come from training tokens."""
        return self.alpha > 0 and self.clone_normalization != "none"
