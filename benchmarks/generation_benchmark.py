"""`benchmark.py generation`: tokens per second that plain transformers generates with, model by model, as ratios to the
first.

All models decode the same number of tokens after a prompt of the same length, greedily, with a KV cache, and take
turns, round by round, so that each round has ratios of its own and what they differ by is the noise. What they generate
does not matter here, so prompts are the tokens from 0 on. The cache is measured, not computed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Spread, table, timed
from benchmarks.measured_models import check_positive
from megatron_lrc.evaluation.exported_models import choose_device, load_model


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", type=Path, metavar="DIR", help="Hugging Face directories")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="before them (default: 512)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="to generate (default: 64)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="sequences at once (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (default: 5)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(default: float32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def run(arguments: argparse.Namespace, report: Callable[[str], None]) -> int:
    check_positive(arguments, "prompt_tokens", "new_tokens", "batch_size", "repeats")
    device, dtype = choose_device(arguments.device), getattr(torch, arguments.dtype)
    models = [load_model(path, device=device, dtype=dtype) for path in arguments.models]
    counts = f"{arguments.new_tokens} tokens after {arguments.prompt_tokens}, {arguments.batch_size} sequence(s)"
    report(f"{counts}, {device}, {arguments.dtype}")
    rounds = [[_generate(model, arguments) for model in models] for _ in range(arguments.repeats + 1)][1:]  # warmed up
    rows = [["", "parameters", "KV cache, bytes/token", "tokens/s", "of the first"]]
    made = arguments.new_tokens * arguments.batch_size
    for place, (path, model) in enumerate(zip(arguments.models, models, strict=True)):
        speeds = [made / seconds[place][0] for seconds in rounds]
        ratios = [seconds[0][0] / seconds[place][0] for seconds in rounds]
        parameters, cache = model.num_parameters(), rounds[0][place][1]
        rows.append(
            [str(path), f"{parameters / 1e6:.1f}M", f"{cache:,}", Spread.of(speeds).text(1), Spread.of(ratios).text(2)]
        )
    for line in table(rows):
        report(line)
    return 0


@torch.inference_mode()
def _generate(model: Any, arguments: argparse.Namespace) -> tuple[float, int]:
    """Seconds of the decoding, that of the prompt left out, and bytes that the cache then has for each token."""
    prompt = torch.arange(arguments.prompt_tokens, device=model.device) % model.config.vocab_size
    output = model(prompt.expand(arguments.batch_size, -1), use_cache=True, logits_to_keep=1)

    def decode() -> Any:
        last = output
        for _ in range(arguments.new_tokens):
            tokens = last.logits[:, -1:].argmax(-1)
            last = model(tokens, past_key_values=last.past_key_values, use_cache=True)
        return last.past_key_values

    seconds, cache = timed(decode, model.device)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    return seconds, held // (arguments.batch_size * (arguments.prompt_tokens + arguments.new_tokens))
