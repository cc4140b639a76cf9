"""What tools/evaluate.py does: figures of one model, as lines and as a dict for JSON."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lrc.config import ConfigError
from megatron_lrc.data.directory_tokenizer import has_tokenizer
from megatron_lrc.data.tokenizers import load_tokenizer
from megatron_lrc.evaluation.exported_models import as_hugging_face, choose_device, hugging_face_teacher, load_model
from megatron_lrc.evaluation.harness import check_tasks, run_tasks
from megatron_lrc.evaluation.heldout import Corpus, Part, read_indexed, read_text
from megatron_lrc.evaluation.language_modeling import Figures, figures_of, measure
from megatron_lrc.evaluation.nine_tasks import NINE_TASKS, PUBLISHED_AVERAGES, average_of, published_averages
from megatron_lrc.evaluation.task_files import read_source
from megatron_lrc.evaluation.task_scores import TaskScore
from megatron_lrc.whole_files import write_whole

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """As the flags of tools/evaluate.py, which describes them."""

    model: Path
    teacher: Path | None
    data_path: list[str]
    split: str
    eval_split: Part
    input: list[str]
    json_key: str
    seq_length: int
    batch_size: int
    max_tokens: int
    device: str
    dtype: str
    tasks: list[str]
    tasks_dir: Path | None
    num_fewshot: int
    limit: int | None
    output: Path | None


def evaluate(options: EvaluationOptions, report: Report) -> dict[str, Any]:
    """Everything that the options ask for; said as it is found, given as what is written to --output."""
    check_options(options)
    device, dtype = choose_device(options.device), getattr(torch, options.dtype)
    teacher_path = str(options.teacher) if options.teacher else None
    with ExitStack() as stack:
        directory = stack.enter_context(as_hugging_face(options.model, teacher_path, report))
        model = load_model(directory, device=device, dtype=dtype)
        found: dict[str, Any] = {
            "model": str(options.model),
            "parameters": model.num_parameters(),
            "hidden_size": model.config.hidden_size,
            "dtype": options.dtype,
            "device": device.type,
        }
        report(
            f"{options.model}: {type(model).__name__}, {found['parameters'] / 1e6:.1f}M parameters, hidden size "
            f"{found['hidden_size']}; {options.dtype} on {device}"
        )
        if options.data_path or options.input:
            found["heldout"] = _heldout(options, model, directory, report)
        if options.tasks:
            found["tasks"] = _tasks(options, model, directory, report)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.output, json.dumps(found, indent=2, allow_nan=False) + "\n")
    return found


def check_options(options: EvaluationOptions) -> None:
    """ConfigError for what no model could be evaluated with."""
    if not (options.data_path or options.input or options.tasks):
        raise ConfigError("There is nothing to evaluate on. Give --data-path, --input or --tasks.")
    if options.teacher and not (options.data_path or options.input):
        raise ConfigError("--teacher is compared with on held-out text. Give --data-path or --input as well.")
    check_numbers(options, {"seq_length": 1, "batch_size": 1, "max_tokens": 0, "num_fewshot": 0, "limit": 1})
    if options.tasks_dir and not options.tasks_dir.is_dir():
        raise ConfigError(f"--tasks-dir {options.tasks_dir} is no folder.")
    if options.tasks:
        check_tasks(chosen_tasks(options.tasks))


def check_numbers(options: Any, least: dict[str, int]) -> None:
    """ConfigError for an option below what it can be."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is below {smallest}. Give {smallest} or more.")


# ------------------------------------------------------------------------------------------------ held-out text


def _heldout(options: EvaluationOptions, model: Any, directory: Path, report: Report) -> dict[str, Any]:
    """Figures of each corpus, and of all tokens together where there are several."""
    corpora: list[Corpus] = []
    if options.data_path:
        corpora += read_indexed(options.data_path, options.split, options.eval_split, directory)
    if options.input:
        corpora.append(read_text(options.input, options.json_key, directory, report))
    teacher, vocab_size = None, int(model.config.vocab_size)
    if options.teacher:
        teacher = load_model(hugging_face_teacher(options.teacher), device=model.device, dtype=model.dtype)
        vocab_size = common_vocabulary(directory, model, options.teacher, teacher)
    figures: dict[str, Figures] = {}
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for corpus in corpora:
        batches = corpus.batches(options.seq_length, options.batch_size, vocab_size, options.max_tokens)
        figures[corpus.name], sums = measure(model, batches, teacher=teacher, vocab_size=vocab_size)
        total = total + sums
    if len(corpora) > 1:
        figures["all"] = figures_of(total, with_teacher=teacher is not None)
    for name, found in figures.items():
        for line in describe(name, found):
            report(line)
    return {
        "seq_length": options.seq_length,
        "teacher": str(options.teacher) if options.teacher else None,
        "figures": {name: found.to_dict() for name, found in figures.items()},
    }


def common_vocabulary(directory: Path, model: Any, other_directory: Path, other: Any) -> int:
    """Columns of logits that both have. One may be padded beyond the other's; ConfigError for other tokens than its."""
    sizes = int(model.config.vocab_size), int(other.config.vocab_size)
    if sizes[0] != sizes[1] or (has_tokenizer(directory) and has_tokenizer(other_directory)):
        first, second = (load_tokenizer(str(path)) for path in (directory, other_directory))
        if not first.made(second.as_manifest()) or (sizes[0] != sizes[1] and first.vocab_size > min(sizes)):
            raise ConfigError(
                f"{directory} has a vocabulary of {sizes[0]} and {other_directory} one of {sizes[1]}, and their "
                f"tokenizers are not the same ({first.difference_from(second)}), so their predictions cannot be "
                "compared. Two models of one tokenizer are expected."
            )
    return min(sizes)


def describe(name: str, figures: Figures) -> list[str]:
    """The figures of one corpus: a line for the model, and with a teacher two more."""
    lines = [
        f"{name}: {figures.tokens:,} tokens",
        f"  model    LM loss {figures.lm_loss:.4f}, perplexity {figures.perplexity:.2f}, next token right "
        f"{100 * figures.next_token_accuracy:.2f} %",
    ]
    if figures.kl is not None:
        lines += [
            f"  teacher  LM loss {figures.teacher_lm_loss:.4f}, perplexity {figures.teacher_perplexity:.2f}, next "
            f"token right {100 * (figures.teacher_next_token_accuracy or 0):.2f} %",
            f"  KL(teacher || model) {figures.kl:.4f} nats per token, top-1 agreement "
            f"{100 * (figures.top1_agreement or 0):.2f} %",
        ]
    return lines


# ------------------------------------------------------------------------------------------------ tasks


def _tasks(options: EvaluationOptions, model: Any, directory: Path, report: Report) -> dict[str, Any]:
    tasks = chosen_tasks(options.tasks)
    found = run_tasks(
        model,
        directory,
        tasks,
        tasks_dir=options.tasks_dir,
        batch_size=options.batch_size,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
    )
    for line in task_table(found.scores):
        report(line)
    for task, (scored, known) in found.parts.items():
        if scored < known:
            report(f"{task}: {scored} of its {known} subjects")
    scores = {task: score.score for task, score in found.scores.items()}
    is_comparable = found.is_whole and options.limit is None and options.num_fewshot == 0
    average = average_of(scores) if is_comparable else None
    if "all" in options.tasks:
        for line in published_averages(options.model.name, average):
            report(line)
        if average is None:
            report("Published averages are over all nine tasks, whole and zero-shot: this run has none to compare.")
    return {
        "average": average,
        "scores": scores,
        "stderr": {task: score.stderr for task, score in found.scores.items()},
        "bits_per_byte": {task: score.bits_per_byte for task, score in found.scores.items()},
        "bits_per_byte_stderr": {task: score.bits_per_byte_stderr for task, score in found.scores.items()},
        "rows": {task: score.rows for task, score in found.scores.items()},
        "metrics": {task: score.metric for task, score in found.scores.items()},
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
        "source": read_source(options.tasks_dir),
        "subtasks": {task: {"scored": scored, "known": known} for task, (scored, known) in found.parts.items()},
        "harness": found.details,
        "published": {"average_percent": PUBLISHED_AVERAGES},
    }


def chosen_tasks(names: list[str]) -> list[str]:
    """Each once; `all` means the nine."""
    return list(dict.fromkeys(task for name in names for task in (NINE_TASKS if name == "all" else (name,))))


def task_table(scores: Mapping[str, TaskScore]) -> list[str]:
    """Lines: a task each, accuracies in percent and other metrics as they are, with standard errors."""
    table = [["task", "metric", "rows", "score", "bits per byte"]]
    for task, found in scores.items():
        heading = NINE_TASKS[task][0] if task in NINE_TASKS else task
        factor, digits = (100, 2) if found.metric.startswith(("acc", "exact_match")) else (1, 4)
        score = _with_error(found.score, found.stderr, factor, digits) + (" %" if factor == 100 else "")
        bits = _with_error(found.bits_per_byte, found.bits_per_byte_stderr, 1, 3)
        table.append([heading, found.metric, f"{found.rows:,}", score, bits])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    placed = [[*map(str.ljust, row[:2], widths[:2]), *map(str.rjust, row[2:], widths[2:])] for row in table]
    return ["  ".join(cells).rstrip() for cells in placed]


def _with_error(value: float | None, error: float | None, factor: int, digits: int) -> str:
    if value is None:
        return "-"
    text = f"{factor * value:.{digits}f}"
    return text if error is None else f"{text} +- {factor * error:.{digits}f}"
