"""Logits of a Hugging Face directory by transformers' own forward, one decoder layer in memory at a time.

`from_pretrained` builds the model and says whether it found every tensor; its parameters stay views of the files that
nobody reads. Hooks then widen each layer's weights from the files just before it runs and drop them behind it. RoPE,
masks, norms and the order of everything are transformers' own: what is computed is what a user of the directory gets.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from megatron_lrc.config import ConfigError
from megatron_lrc.data.pretrained import load_causal_model
from megatron_lrc.hf.architectures import FAMILIES
from megatron_lrc.hf.teacher import WEIGHT_FILES, files_of_tensors
from megatron_lrc.json_files import read_json

#: Rows of an LM head that are widened at once, and the batch that models are compared on.
HEAD_ROWS, SEQUENCES, SEQUENCE_LENGTH = 8192, 2, 64
#: The name under which transformers knows `_capped_attention`.
_CAPPED = "megatron_lrc_capped"


def fixed_tokens(vocab_size: int) -> Tensor:
    """int64 [2, 64]: the batch that models are compared on, spread evenly over the whole vocabulary."""
    golden = round(vocab_size * (math.sqrt(5) - 1) / 2)
    return (torch.arange(SEQUENCES * SEQUENCE_LENGTH) * golden % vocab_size).view(SEQUENCES, SEQUENCE_LENGTH)


class HuggingFaceModel:
    """A directory, opened by plain transformers. ConfigError where it cannot be, or where tensors do not fit."""

    def __init__(self, directory: Path):
        self.directory = directory
        _check_format(directory)
        self._model: Any = load_pretrained(directory)
        self._file_of = _file_of(directory)
        self._room: dict[tuple[str, torch.Size], Tensor] = {}
        self.architecture = type(self._model).__name__
        config = self._model.config
        self.num_layers, self.hidden_size = int(config.num_hidden_layers), int(config.hidden_size)
        self.vocab_size = int(config.vocab_size)
        self._names = _file_names_of_parameters(self._model, self._file_of)
        self.weights_dtype = self._read(self._model.get_input_embeddings().weight).dtype

    @torch.no_grad()
    def logits(
        self, tokens: Tensor, dtype: torch.dtype = torch.float32, weights_dtype: torch.dtype | None = None
    ) -> Tensor:
        """[b, s, v], computed in `dtype`. tokens: [b, s]. Once per opened model.

        weights_dtype: what weights are rounded to first; None leaves them as they are in the files. Memory: a layer in
        `dtype`, and the LM head as it is in the files. In float64 transformers' RMSNorm, and its softmax of capped
        scores, which always round to float32, give way to others, which do not.
        """
        model, self._model = self._model, None
        assert model is not None, "its hooks have taken the weights apart"
        self._dtype, self._weights_dtype = dtype, weights_dtype
        embedding, head, decoder = model.get_input_embeddings(), model.get_output_embeddings(), model.get_decoder()
        if head.bias is not None:
            raise ConfigError(f"{self.directory}: an LM head with a bias is not supported.")
        embedding.weight.data = self._read(embedding.weight)  # a view of the file: only the tokens' rows are read
        embedding.register_forward_hook(self._embed)
        model.set_output_embeddings(_HeadByRows(self._read(head.weight), lambda rows: self._rounded(rows).to(dtype)))
        if dtype == torch.float64:
            _keep_wide(model)
        for unit in (*decoder.layers, decoder.norm):
            unit.register_forward_pre_hook(lambda module, inputs: self._fill(module))
            unit.register_forward_hook(lambda module, inputs, output: _empty(module))
        return model(tokens, use_cache=False).logits

    def _embed(self, embedding: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """A forward hook. Gemma's class multiplies embeddings, which is to be done in the wide dtype too."""
        rows = self._rounded(F.embedding(inputs[0], embedding.weight)).to(self._dtype)
        return rows * embedding.embedding_dim**0.5 if hasattr(embedding, "embed_scale") else rows

    def _fill(self, unit: nn.Module) -> None:
        """Give a layer its weights, in room that all layers use in turn: freed room would not all be used again."""
        for own_name, parameter in unit.named_parameters():
            weight = self._rounded(self._read(parameter))
            key = own_name, weight.shape
            if key not in self._room:
                self._room[key] = torch.empty(weight.shape, dtype=self._dtype)
            parameter.data = self._room[key].copy_(weight)

    def _rounded(self, weight: Tensor) -> Tensor:
        return weight if self._weights_dtype is None else weight.to(self._weights_dtype)

    def _read(self, parameter: nn.Parameter) -> Tensor:
        """A view of the file. It is opened anew: what has been read of a file stays in memory as long as it is open."""
        name = self._names[parameter]
        return safe_open(self._file_of[name], framework="pt", device="cpu").get_tensor(name)


class _HeadByRows(nn.Module):
    """An LM head without bias that is multiplied with a block of its rows at a time."""

    def __init__(self, weight: Tensor, widen: Callable[[Tensor], Tensor]):
        super().__init__()
        self.blocks, self.widen = weight.split(HEAD_ROWS), widen

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([F.linear(hidden, self.widen(block)) for block in self.blocks], dim=-1)


def _check_format(directory: Path) -> None:
    """Refuse what is not computed here, before transformers opens it."""
    if not any((directory / name).is_file() for name in WEIGHT_FILES):
        raise ConfigError(f"{directory} holds no safetensors. Only models in that format can be compared.")
    try:
        architectures = read_json(directory / "config.json").get("architectures")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{directory / 'config.json'} cannot be read ({error}). Download or copy it again."
        ) from error
    supported = list(dict.fromkeys(family.architecture for family in FAMILIES))
    if architectures not in [[name] for name in supported]:
        raise ConfigError(
            f"{directory}: config.json has architectures {architectures}. Those that can be compared: "
            f"{', '.join(supported)}."
        )


def load_pretrained(directory: Path, dtype: torch.dtype | str = "auto") -> Any:
    """The model as plain transformers loads it, checked to have found exactly the tensors it wants.

    dtype: of its weights; "auto" is that of the files, of which they are views then.
    """
    try:
        with _without_progress_bars():
            loaded = load_causal_model(directory, dtype=dtype, output_loading_info=True)
    except ConfigError:
        raise
    except Exception as error:  # whatever transformers raises, a user cannot load the directory either
        reason = " ".join(str(error).split())[:500]
        raise ConfigError(f"transformers cannot load {directory} ({type(error).__name__}: {reason}).") from error
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ConfigError(
                f"transformers {transformers.__version__} reports {kind} {sorted(report[kind])[:4]} in {directory}."
            )
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and not is_tied:  # transformers warns and goes by the files; others tie
        raise ConfigError(
            f"{directory}: config.json has tie_word_embeddings: true, but the files hold an LM head that differs from "
            "the embedding."
        )
    return model.eval()


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _file_of(directory: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    return {name: directory / file for name, file in files_of_tensors(directory).items()}


def _file_names_of_parameters(model: nn.Module, file_of: dict[str, Path]) -> dict[nn.Parameter, str]:
    """Each parameter's name in the files. A tied LM head is the embedding's parameter, and has its name."""
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in file_of:
            names.setdefault(parameter, name)
    return names


def _keep_wide(model: Any) -> None:
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and type(module) is not nn.RMSNorm:
            norm: Any = module
            is_zero_centered = not hasattr(norm, "variance_epsilon")  # Gemma's class
            epsilon = norm.eps if is_zero_centered else norm.variance_epsilon
            exact = (_ZeroCenteredNorm if is_zero_centered else nn.RMSNorm)(norm.weight.shape, epsilon, device="meta")
            exact.weight = norm.weight
            model.set_submodule(path, exact)
    if getattr(model.config, "attn_logit_softcapping", None):
        # Here, since they import torch.compile's front end.
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(_CAPPED, _capped_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_CAPPED, sdpa_mask)
        model.set_attn_implementation(_CAPPED)


class _ZeroCenteredNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, 1.0 + self.weight, self.eps)


def _capped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """transformers' own but for the softmax's dtype. query [b, heads, s, c], key and value [b, groups, s, c]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = torch.tanh(query @ key.mT * (how["scaling"] / how["softcap"])) * how["softcap"]
    if attention_mask is None:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    weights = scores.masked_fill(~attention_mask, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _empty(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.new_empty(0)
