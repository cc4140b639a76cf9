"""Logits of a Hugging Face directory by transformers' own forward, one decoder layer in memory at a time.

`from_pretrained` builds the model and says whether it found every tensor; its parameters stay views of the files that
nobody reads. Hooks then widen each layer's weights from the files just before it runs and drop them behind it. RoPE,
masks, norms and the order of everything are transformers' own: what is computed is what a user of the directory gets.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from megatron_lrc.config import ConfigError
from megatron_lrc.hf.teacher import INDEX_FILE, SINGLE_FILE

#: Rows of an LM head that are widened at once, and the batch that models are compared on.
HEAD_ROWS, SEQUENCES, SEQUENCE_LENGTH = 8192, 2, 64


def fixed_tokens(vocab_size: int) -> Tensor:
    """int64 [2, 64]: the batch that models are compared on, spread evenly over the whole vocabulary."""
    golden = round(vocab_size * (math.sqrt(5) - 1) / 2)
    return (torch.arange(SEQUENCES * SEQUENCE_LENGTH) * golden % vocab_size).view(SEQUENCES, SEQUENCE_LENGTH)


class HuggingFaceModel:
    """A directory, opened by plain transformers. ConfigError where it cannot be, or where tensors do not fit."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._model: Any = _from_pretrained(directory)
        self._file_of = _file_of(directory)
        self.architecture = type(self._model).__name__
        config = self._model.config
        self.num_layers, self.hidden_size = int(config.num_hidden_layers), int(config.hidden_size)
        self.vocab_size = int(config.vocab_size)
        self.weights_dtype: torch.dtype = self._model.get_input_embeddings().weight.dtype

    @torch.no_grad()
    def logits(self, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[b, s, v] in `dtype`, from weights as they are in the files. tokens: [b, s]. Once per opened model.

        Memory: a layer in `dtype`, and the embedding or the LM head as it is in the files. In float64 transformers'
        RMSNorm, which always rounds to float32, gives way to torch's, which does not.
        """
        model = self._model
        names = _file_names_of_parameters(model, self._file_of)
        if dtype == torch.float64:
            _keep_norms_wide(model)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head.bias is not None:
            raise ConfigError(f"{self.directory}: an LM head with a bias is not supported.")
        embedding.register_forward_hook(lambda module, inputs, output: output.to(dtype))
        model.set_output_embeddings(_HeadByRows(self._file_of[name := names[head.weight]], name, dtype))
        decoder = model.get_decoder()
        for unit in (*decoder.layers, decoder.norm):
            parameters = [(parameter, names[parameter]) for parameter in unit.parameters()]
            unit.register_forward_pre_hook(lambda module, inputs, given=parameters: self._fill(given, dtype))
            unit.register_forward_hook(lambda module, inputs, output: _empty(module))
        return model(tokens, use_cache=False).logits

    def _fill(self, parameters: list[tuple[nn.Parameter, str]], dtype: torch.dtype) -> None:
        opened: dict[Path, Any] = {}  # anew for each layer: pages of a file stay in memory as long as it is open
        for parameter, name in parameters:
            path = self._file_of[name]
            if path not in opened:
                opened[path] = safe_open(path, framework="pt", device="cpu")
            parameter.data = opened[path].get_tensor(name).to(dtype, copy=True)


class _HeadByRows(nn.Module):
    """An LM head without bias that is multiplied with a block of its rows at a time."""

    def __init__(self, file: Path, name: str, dtype: torch.dtype):
        super().__init__()
        self.rows, self.dtype = safe_open(file, framework="pt", device="cpu").get_slice(name), dtype

    def forward(self, hidden: Tensor) -> Tensor:
        starts = range(0, self.rows.get_shape()[0], HEAD_ROWS)
        blocks = (self.rows[start : start + HEAD_ROWS].to(self.dtype) for start in starts)
        return torch.cat([F.linear(hidden, block) for block in blocks], dim=-1)


def _from_pretrained(directory: Path) -> Any:
    """The model as plain transformers loads it, checked to have found exactly the tensors it wants."""
    try:
        with _without_progress_bars():
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype="auto", local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # whatever transformers raises, a user cannot load the directory either
        reason = " ".join(str(error).split())
        raise ConfigError(f"transformers cannot load {directory} ({type(error).__name__}: {reason}).") from error
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ConfigError(
                f"transformers {transformers.__version__} reports {kind} {sorted(report[kind])[:4]} in {directory}."
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
    """Tensor name -> the safetensors file that holds it, as transformers finds it."""
    if (directory / SINGLE_FILE).is_file():
        with safe_open(directory / SINGLE_FILE, framework="pt", device="cpu") as file:
            return dict.fromkeys(file.keys(), directory / SINGLE_FILE)
    if not (directory / INDEX_FILE).is_file():
        raise ConfigError(f"{directory} holds no safetensors. Only models in that format can be compared.")
    weight_map = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
    return {name: directory / file for name, file in weight_map.items()}


def _file_names_of_parameters(model: nn.Module, file_of: dict[str, Path]) -> dict[nn.Parameter, str]:
    """Each parameter's name in the files. A tied LM head is the embedding's parameter, and has its name."""
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in file_of:
            names.setdefault(parameter, name)
    return names


def _keep_norms_wide(model: nn.Module) -> None:
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and type(module) is not nn.RMSNorm:
            norm: Any = module
            exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, device="meta")
            exact.weight = norm.weight
            model.set_submodule(path, exact)


def _empty(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.new_empty(0)
