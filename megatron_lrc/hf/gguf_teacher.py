"""Writes a Hugging Face directory of a Llama-family teacher from one GGUF file.

    python -m megatron_lrc.hf.gguf_teacher --gguf SmolLM2-135M-Instruct.Q4_1.gguf --output demo/teacher

The demo's teacher comes from a package index as a quantised GGUF file (`comparison/smollm2.py`). It is read as
tools/convert_from_hf.py reads one, and stored in float32: that is exactly what dequantisation gave, and rounding it
once more to bfloat16 would make a different teacher. The directory is read back and compared with the GGUF model before
it gets its final name.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_lrc.data.pretrained import load_causal_model, load_tokenizer_files
from megatron_lrc.hf.gguf import read_gguf, save_gguf_tokenizer, saveable
from megatron_lrc.hf.output_folder import complete_or_absent

SAMPLE = (
    "The sea was calm that morning, and the fishermen had already left the harbour when the sun came up behind the "
    "hills. An old man sat on the wall beside the church and watched the boats grow smaller. He had worked on one of "
    "them for forty years, and he still knew the name of every captain in the village."
)
ROUND_TRIP = [
    "Hello world",
    "  two  spaces,\ttab\nand 12345 digits",
    "don't; caf\u00e9 \u6f22\u5b57",
    "<|im_start|>user\nhi<|im_end|>",
]


def write_teacher(gguf: Path, output: Path) -> None:
    """Builds, saves and checks the directory under a temporary name, then gives it its final one."""
    source, tokenizer = read_gguf(gguf)
    if source.config.model_type != "llama":
        raise ValueError(f"--gguf {gguf} holds a {source.config.model_type} model; a Llama model is expected.")
    with complete_or_absent(output, source=gguf) as partial:
        saveable(source).save_pretrained(partial)
        save_gguf_tokenizer(tokenizer, partial, gguf)
        check_teacher(partial, source)


@torch.no_grad()
def check_teacher(directory: Path, source: LlamaForCausalLM) -> None:
    """Reads the directory back as any user would; refuses it unless it is the GGUF file's model and tokenizer."""
    model = load_causal_model(directory).eval()
    tokenizer = load_tokenizer_files(AutoTokenizer, directory)
    config = model.config
    ids = tokenizer(SAMPLE, return_tensors="pt")["input_ids"]
    prediction = model(ids, labels=ids)
    checks = {
        "the logits equal the GGUF model's": torch.equal(prediction.logits, source(ids).logits),
        "the LM head is tied as config.json says": (
            (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_word_embeddings
        ),
        "the tokenizer has the model's vocabulary": len(tokenizer) == config.vocab_size,
        "the tokenizer gives back its input": all(
            tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
            for text in ROUND_TRIP
        ),
        "config.json and the tokenizer agree on bos and eos": (
            (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        ),
        "the chat template is there": bool(tokenizer.chat_template),
        "the LM loss on plain English is below 4": bool(prediction.loss < 4.0),
    }
    failed = [claim for claim, holds in checks.items() if not holds]
    if failed:
        raise ValueError(
            f"The teacher written to {directory} is wrong: it does not hold that " + "; that ".join(failed) + "."
        )
    print(*(f"  ok: {claim}" for claim in checks), sep="\n")
    print(f"LM loss {prediction.loss:.3f} nats/token on a paragraph of plain English.")
    print(
        f"{model.num_parameters() / 1e6:.1f}M parameters, {config.num_hidden_layers} layers, hidden size "
        f"{config.hidden_size}, {config.num_attention_heads} heads, {config.num_key_value_heads} KV heads, "
        f"FFN {config.intermediate_size}, vocabulary {config.vocab_size}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="GGUF file of a Llama model with its tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    try:
        if not args.gguf.is_file():
            raise ValueError(f"--gguf {args.gguf} is not a file; expected one *.gguf file.")
        if args.output.exists():
            raise ValueError(f"--output {args.output} exists already; remove it or name another directory.")
        write_teacher(args.gguf, args.output)
    except (ValueError, OSError) as error:
        print(f"gguf_teacher: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
