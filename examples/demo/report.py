"""Compares teacher, untrained student and trained student: measured with plain transformers, as any user would.

    python examples/demo/report.py --teacher DIR --untrained DIR --student DIR --heldout heldout.jsonl \\
        --run RUN --output-dir demo [--questions questions.jsonl]

Prints held-out loss, perplexity, the share of questions answered rightly and a greedy continuation of one
prompt for each model, all on the same tokens, and writes report.txt (what was printed), report.json (the
figures) and loss_curves.svg. Nothing of megatron_lrc loads or runs the models; it draws the curves.
"""

import argparse
import inspect
import json
import math
import multiprocessing
import os
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from megatron_lrc.data.pretrained import load_causal_model, load_tokenizer_files
from megatron_lrc.evaluation.questions import Question, padded, read_questions
from megatron_lrc.report.chart_files import write_charts
from megatron_lrc.report.charts import Chart, Series
from megatron_lrc.train.progress import gap_text

TERMS = {  # of the loss, as metrics.jsonl names them: title, unit
    "gap": ("LM loss above the teacher's on the same tokens", "nats per token"),
    "kl_loss": ("KL loss", "nats per token, times tau squared"),
    "clone_loss": ("Clone loss", "summed over layers"),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of one model."""

    directory: str
    parameters: int
    hidden_size: int
    lm_loss: float  # nats per token
    perplexity: float
    accuracy: float | None  # share of the questions; None without any
    continuation: str


def heldout_blocks(path: Path, tokenizer: PreTrainedTokenizerBase, *, block: int, max_tokens: int) -> torch.Tensor:
    """(n, block + 1) token ids: documents joined by the end-of-document token, cut, and n blocks taken evenly from all.

    Each row predicts `block` tokens, and consecutive rows of the text share one, as in training.
    """
    ids: list[int] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    available = (len(ids) - 1) // block
    if not available:
        raise ValueError(f"--heldout {path} has {len(ids)} tokens; at least one block of {block + 1} is needed.")
    count = min(available, max(1, max_tokens // block))
    starts = [block * (i * available // count) for i in range(count)]
    return torch.tensor([ids[start : start + block + 1] for start in starts])


@torch.inference_mode()
def lm_loss(model: PreTrainedModel, blocks: torch.Tensor) -> float:
    """Mean loss in nats per token. One block at a time: the logits of all of them would fill the memory."""
    total = 0.0
    for row in blocks:
        logits = model(row[None, :-1]).logits[0]  # (block, v)
        total += F.cross_entropy(logits.float(), row[1:], reduction="sum").item()
    return total / blocks[:, 1:].numel()


@torch.inference_mode()
def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """The most likely next tokens, one at a time; the prompt left out."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def choose(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: Question) -> int:
    """The index of the likeliest choice, as `megatron_lrc.evaluation.questions` defines it.

    The prompt is read once; its keys and values then serve all choices.
    """
    prompt = tokenizer(question.prompt)["input_ids"]
    choices = [tokenizer(question.prompt + text)["input_ids"][len(prompt) :] for text in question.choices]
    tokens, is_real = padded(choices)  # (n, s): n choices
    cache = DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # of older versions
    first = model(torch.tensor([prompt]), use_cache=True, **{name: cache}).logits[:, -1:]
    cache.batch_repeat_interleave(len(choices))
    others = model(tokens, use_cache=True, **{name: cache}).logits[:, :-1]
    logits = torch.cat([first.expand(len(choices), -1, -1), others], dim=1)  # (n, s, v)
    log_probabilities = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return int((log_probabilities * is_real).sum(-1).argmax())


def share_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question]) -> float | None:
    right = [choose(model, tokenizer, question) == question.answer for question in questions]
    return sum(right) / len(right) if right else None


def measure(
    directory: Path,
    blocks: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    *,
    prompt: str,
    tokens: int,
) -> Result:
    model = load_causal_model(directory, dtype=torch.float32).eval()
    loss = lm_loss(model, blocks)
    return Result(
        directory=str(directory),
        parameters=model.num_parameters(),
        hidden_size=model.config.hidden_size,
        lm_loss=loss,
        perplexity=math.exp(loss),
        accuracy=share_right(model, tokenizer, questions),
        continuation=continuation(model, tokenizer, prompt, tokens),
    )


def measure_all(
    models: dict[str, Path],
    blocks: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    *,
    prompt: str,
    tokens: int,
) -> dict[str, Result]:
    """Every model's result, in the order of `models`. One process per core and model, as far as there are cores.

    Processes instead of threads: where something else runs too, threads of one model wait for the slowest of
    them.
    """
    cores = len(os.sched_getaffinity(0))
    workers = min(cores, len(models))
    start = time.monotonic()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), prepare, (cores // workers,)) as pool:
        futures = {
            pool.submit(measure, directory, blocks, tokenizer, questions, prompt=prompt, tokens=tokens): name
            for name, directory in models.items()
        }
        for future in as_completed(futures):
            future.result()
            print(f"  measured the {futures[future]} ({time.monotonic() - start:.0f} s)", flush=True)
    return {name: future.result() for future, name in futures.items()}


def prepare(threads: int) -> None:
    """Settings of one measuring process."""
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()


def read_records(path: Path) -> list[dict]:
    """The records of a JSON-lines log, by step. Of a step done again by a continued run, the last counts."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = {record["step"]: record for record in map(json.loads, lines)}
    return [records[step] for step in sorted(records)]


def read_run(run: Path) -> tuple[list[dict], list[dict]]:
    """(training records, validation records) of a run directory; a run need not have validated."""
    training, validation = read_records(run / "metrics.jsonl"), read_records(run / "validation.jsonl")
    if not training:
        raise ValueError(f"--run {run} has no training step in metrics.jsonl; train for at least one step first.")
    return training, validation


def points(records: list[dict], term: str) -> list[tuple[int, float]]:
    """(tokens trained on, value) of the records that have the term; `gap`: the student's LM loss less the teacher's,
    in which what the tokens of a batch are worth cancels."""
    names = ("lm_loss", "teacher_lm_loss") if term == "gap" else (term,)
    having = [record for record in records if all(record.get(name) is not None for name in names)]
    return [(record["tokens"], record[names[0]] - sum(record[name] for name in names[1:])) for record in having]


def draw_curves(results: dict[str, Result], training: list[dict], validation: list[dict], path: Path) -> None:
    """A chart over the tokens trained on for each term that there is; in the first what this report has measured."""
    charts = []
    for term, (name, unit) in TERMS.items():
        if not any(value for _, value in points(training, term)):  # with --alpha 0 the clone loss is 0
            continue
        series = [
            Series("training batches", points(training, term), 0),
            Series("held-out sample", points(validation, term), 1, "dots"),
        ]
        if term == "gap":
            gaps = {model: result.lm_loss - results["teacher"].lm_loss for model, result in results.items()}
            del gaps["teacher"]
            end = training[-1]["tokens"]
            series += [
                Series(f"{model}, this report", [(0, gap), (end, gap)], color, "dashed")
                for color, (model, gap) in enumerate(gaps.items(), start=2)
            ]
        # A few tokens with massive activations make the clone loss of single batches leap.
        charts.append(Chart(name, unit, series, is_log=term == "clone_loss", x_name="tokens trained on"))
    teacher, student = results["teacher"], results["trained student"]
    write_charts(
        path,
        charts,
        title=f"Low-Rank Clone: hidden size {teacher.hidden_size} -> {student.hidden_size}",
        note=f"{teacher.parameters / 1e6:.1f}M -> {student.parameters / 1e6:.1f}M parameters",
    )


def summary(results: dict[str, Result], training: list[dict], prompt: str, num_tokens: int, num_questions: int) -> str:
    """The text of the report."""
    lines = [f"Held-out text, {num_tokens} tokens, the same for all:", ""]
    title = "ARC-Easy" if num_questions else ""
    lines.append(f"  {'model':<18} {'hidden':>6} {'parameters':>11} {'LM loss':>12} {'perplexity':>11} {title:>10}")
    for name, result in results.items():
        size = f"{result.parameters / 1e6:.1f}M"
        right = "" if result.accuracy is None else f"{result.accuracy:.1%}"
        lines.append(
            f"  {name:<18} {result.hidden_size:>6} {size:>11} {result.lm_loss:>12.4f} {result.perplexity:>11.1f} "
            f"{right:>10}"
        )
    lines = [line.rstrip() for line in lines]
    lines += ["", "  LM loss in nats per token."]
    if num_questions:
        error = 100 * math.sqrt(0.25 / num_questions)
        lines.append(
            f"  ARC-Easy: {num_questions} science questions, each answered by the likeliest of mostly four texts; the "
            f"standard error is {error:.0f} points."
        )
    lines += ["", training_sentence(results, training)]
    lines += ["", f"Greedy continuations of: {prompt!r}", ""]
    for name, result in results.items():
        text = " ".join(result.continuation.split())
        lines.append(textwrap.fill(text, 110, initial_indent=f"  {name:<18} ", subsequent_indent=" " * 21))
    return "\n".join(lines)


def training_sentence(results: dict[str, Result], training: list[dict]) -> str:
    """How much was trained, and what came of it: the share of the gap to the teacher that training closed."""
    last = training[-1]
    teacher, untrained, trained = (
        results[name].lm_loss for name in ("teacher", "untrained student", "trained student")
    )
    effect = f"Held-out LM loss {untrained:.3f} -> {trained:.3f}"
    if gap := gap_text(untrained, trained, teacher):
        effect += f", {gap}"
    return f"{last['tokens']:,} tokens in {last['step']} steps, {mean_rate(training):.0f} tokens/s. {effect}."


def mean_rate(training: list[dict]) -> float:
    """Tokens per second over the logged steps, each step counting by its duration."""
    seconds = sum(record["step_seconds"] for record in training)
    return sum(record["tokens_per_second"] * record["step_seconds"] for record in training) / seconds


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def report(args: argparse.Namespace) -> None:
    """Measures the three models and writes everything; report.txt last, as the sign that all of it is there."""
    training, validation = read_run(args.run)
    tokenizer = load_tokenizer_files(AutoTokenizer, args.teacher)
    blocks = heldout_blocks(args.heldout, tokenizer, block=args.block, max_tokens=args.max_tokens)
    questions = read_questions(args.questions) if args.questions else []
    models = {"teacher": args.teacher, "untrained student": args.untrained, "trained student": args.student}
    results = measure_all(models, blocks, tokenizer, questions, prompt=args.prompt, tokens=args.new_tokens)
    num_tokens = blocks[:, 1:].numel()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw_curves(results, training, validation, args.output_dir / "loss_curves.svg")
    figures = {
        "models": {name: asdict(result) for name, result in results.items()},
        "heldout": {"file": str(args.heldout), "tokens": num_tokens, "block": args.block},
        "questions": {"file": str(args.questions), "number": len(questions)} if questions else None,
        "prompt": args.prompt,
        "training": {"tokens_per_second": mean_rate(training), "first": training[0], "last": training[-1]},
        "validation": validation,
    }
    write_text(args.output_dir / "report.json", json.dumps(figures, indent=2) + "\n")
    text = summary(results, training, args.prompt, num_tokens, len(questions))
    page = args.run / "report.html"
    files = {"The run as a page, for a browser": page} if page.exists() else {}
    files |= {"Curves": args.output_dir / "loss_curves.svg", "Figures": args.output_dir / "report.json"}
    files["The trained student, for transformers"] = args.student
    text += "\n\n" + "".join(f"{what}: {where}\n" for what, where in files.items())
    write_text(args.output_dir / "report.txt", text)
    print("\n" + text, end="")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="Hugging Face directory of the teacher")
    parser.add_argument("--untrained", type=Path, required=True, help="the same of the student before training")
    parser.add_argument("--student", type=Path, required=True, help="the same of the student after training")
    parser.add_argument("--heldout", type=Path, required=True, help='held-out text, JSON lines with "text"')
    parser.add_argument("--questions", type=Path, help="items of megatron_lrc/evaluation/questions.py to be answered")
    parser.add_argument("--run", type=Path, required=True, help="run directory of the training")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for report.txt, report.json and the SVG")
    parser.add_argument("--block", type=int, default=256, help="tokens per sequence; take that of training")
    parser.add_argument("--max-tokens", type=int, default=8192, help="held-out tokens to measure the loss on")
    parser.add_argument("--prompt", default="The function returns a list of", help="text that each model continues")
    parser.add_argument("--new-tokens", type=int, default=40, help="length of the continuations, in tokens")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    transformers_logging.disable_progress_bar()
    try:
        report(args)
    except (ValueError, OSError) as error:  # ConfigError is a ValueError
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
