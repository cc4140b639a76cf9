"""What tools/mask_neurons.py does: the teacher's most active FFN neurons masked in teacher and student alike.

The paper's test of whether a student works as its teacher does (section 5 of the method): their FFN neurons
have the same indices, so if they also have the same meaning, masking those that matter to the teacher harms
the student too, and masking as many others harms neither. A student that lacks layers or neurons of its teacher's says
which ones it has (`hf.kept_file`); what it lacks is masked in the teacher alone.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from torch import Tensor

from megatron_lrc.config import ConfigError
from megatron_lrc.data.directory_tokenizer import open_tokenizer
from megatron_lrc.evaluation import neurons
from megatron_lrc.evaluation.evaluate import check_numbers, common_vocabulary
from megatron_lrc.evaluation.exported_models import as_hugging_face, choose_device, hugging_face_teacher, load_model
from megatron_lrc.evaluation.heldout import Corpus, read_text
from megatron_lrc.evaluation.language_modeling import measure
from megatron_lrc.evaluation.questions import accuracy, encode_questions, in_batches, padded, read_questions
from megatron_lrc.hf.kept_file import KEPT_FILE, read_kept
from megatron_lrc.png_charts import check_matplotlib, png_chart
from megatron_lrc.whole_files import write_whole

Report = Callable[[str], None]
#: Figures of one model under one condition: accuracy, and on text also lm_loss.
Score = dict[str, float]

#: The paper's figures, of its own teacher, student and questions: unmasked, important masked, random masked.
PUBLISHED = {"teacher": (0.85, 0.62, 0.85), "student": (0.48, 0.33, 0.49)}
CONDITIONS = ("unmasked", "important", "random")


@dataclass(frozen=True, kw_only=True)
class MaskingOptions:
    """As the flags of tools/mask_neurons.py, which describes them."""

    teacher: Path
    student: Path
    items: Path | None
    input: list[str]
    prompts: list[str]
    json_key: str
    num_neurons: int
    scope: neurons.Scope
    num_seeds: int
    seed: int
    seq_length: int
    max_tokens: int
    batch_size: int
    device: str
    dtype: str
    output: Path | None
    plot: Path | None


def mask_neurons(options: MaskingOptions, report: Report) -> dict[str, Any]:
    """Score both models under each condition; said as found, written to --output and --plot."""
    _check(options)
    device, dtype = choose_device(options.device), getattr(torch, options.dtype)
    with as_hugging_face(options.student, str(options.teacher), report) as student:
        models = {
            name: load_model(path, device=device, dtype=dtype)
            for name, path in (("teacher", options.teacher), ("student", student))
        }
        of_student = _counterparts(student, neurons.down_projections(models["teacher"]))
        vocab_size = _check_pair(options, models, student, of_student)
        score = _scorer(options, vocab_size)
        means = neurons.mean_activations(models["teacher"], _prompts(options, vocab_size))
        important = neurons.most_active(means, options.num_neurons, options.scope)
        seeds = range(options.seed, options.seed + options.num_seeds)
        drawn = {seed: neurons.random_neurons(important, options.num_neurons, options.scope, seed) for seed in seeds}
        found = {}
        for name, model in models.items():
            own = {"teacher": lambda chosen: chosen, "student": of_student}[name]
            of_seeds = {seed: own(chosen) for seed, chosen in drawn.items()}
            found[name] = _conditions(
                model, own(important), of_seeds, score, lambda line, name=name: report(f"{name}, {line}")
            )
    result = {
        "teacher": str(options.teacher),
        "student": str(options.student),
        "score": "right continuation preferred" if options.items else "next token right",
        "num_neurons": options.num_neurons,
        "scope": options.scope,
        "important": {layer: row.nonzero().flatten().tolist() for layer, row in enumerate(important) if row.any()},
        "models": found,
    }
    for line in describe(result):
        report(line)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.output, json.dumps(result, indent=2) + "\n")
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(options.plot, result)
    return result


def _conditions(
    model: Any, important: Tensor, drawn: dict[int, Tensor], score: Callable[[Any], Score], report: Report
) -> dict[str, dict[str, Any]]:
    """Condition -> score; of the random ones each seed's, their mean and their standard deviation."""

    def score_with(chosen: Tensor | None, condition: str) -> Score:
        with nullcontext() if chosen is None else neurons.masked(model, chosen):
            found = score(model)
        report(f"{condition}: {', '.join(f'{name} {value:.4f}' for name, value in found.items())}")
        return found

    found: dict[str, dict[str, Any]] = {
        "unmasked": score_with(None, "unmasked"),
        "important": score_with(important, "important masked"),
    }
    by_seed = {seed: score_with(chosen, f"random masked, seed {seed}") for seed, chosen in drawn.items()}
    means = {name: mean(scores[name] for scores in by_seed.values()) for name in found["unmasked"]}
    deviations = {f"{name}_std": pstdev([scores[name] for scores in by_seed.values()]) for name in means}
    found["random"] = {**means, **deviations, "by_seed": by_seed}
    return found


# ------------------------------------------------------------------------------------------------ inputs


def _check(options: MaskingOptions) -> None:
    if bool(options.items) == bool(options.input):
        raise ConfigError("Give either --items (questions) or --input (held-out text): one of them is scored.")
    hugging_face_teacher(options.teacher)
    check_numbers(options, {"num_seeds": 1, "batch_size": 1, "seq_length": 1, "num_neurons": 1, "max_tokens": 0})
    if options.plot:
        check_matplotlib("--plot", "the scores are printed as a table in any case")


def _counterparts(student_directory: Path, teacher: list[torch.nn.Linear]) -> Callable[[Tensor], Tensor]:
    """Makes of values of the teacher's neurons [L, I] those of the student's [L', I']. teacher: its down_proj."""
    kept = read_kept(student_directory)
    layers = kept.layers or range(len(teacher))

    def of_student(values: Tensor) -> Tensor:
        rows = [values[layer] for layer in layers]
        return torch.stack([row[kept.rows[i].neurons] if kept.rows else row for i, row in enumerate(rows)])

    return of_student


def _check_pair(
    options: MaskingOptions, models: dict[str, Any], student_directory: Path, of_student: Callable[[Tensor], Tensor]
) -> int:
    """ConfigError unless neuron (layer, index) means something in both; gives the common vocabulary's size."""
    shapes = [[module.in_features for module in neurons.down_projections(model)] for model in models.values()]
    expected, found = torch.zeros(len(shapes[0]), shapes[0][0]), torch.Size([len(shapes[1]), shapes[1][0]])
    try:
        is_pair = of_student(expected).shape == found
    except IndexError:  # it keeps what this teacher has not
        is_pair = False
    if not is_pair:
        sizes = [f"{len(shape)} layers of {max(shape)} FFN neurons" for shape in shapes]
        raise ConfigError(
            f"--teacher {options.teacher} has {sizes[0]} and --student {options.student} has {sizes[1]}, so "
            "their neurons have not the same indices. A student that was cloned from this teacher is expected; one "
            f"that has not all of its layers or neurons says in {KEPT_FILE} which ones."
        )
    return common_vocabulary(student_directory, models["student"], options.teacher, models["teacher"])


def _prompts(options: MaskingOptions, vocab_size: int) -> Iterable[tuple[Tensor, Tensor]]:
    """(tokens, which are real) that activations are measured on: --prompts, else what is scored."""
    if options.items and not options.prompts:
        tokenizer = _tokenizer(options)
        prompts = [tokenizer(question.prompt)["input_ids"] for question in read_questions(options.items)]
        return [padded(batch) for batch in in_batches(sorted(prompts, key=len), options.batch_size)]
    corpus = read_text(options.prompts or options.input, options.json_key, options.teacher)
    return [
        (tokens[:, :-1], torch.ones(tokens[:, :-1].shape, dtype=torch.bool))  # the last one is the next window's first
        for tokens in _batches(options, corpus, vocab_size)
    ]


def _scorer(options: MaskingOptions, vocab_size: int) -> Callable[[Any], Score]:
    """What gives a model's score."""
    if options.items:
        questions = read_questions(options.items)
        continuations = encode_questions(questions, _tokenizer(options))
        sizes = {"batch_size": options.batch_size, "vocab_size": vocab_size}
        return lambda model: {"accuracy": accuracy(model, questions, continuations, **sizes)}
    corpus = read_text(options.input, options.json_key, options.teacher)

    def on_text(model: Any) -> Score:
        figures, _ = measure(model, _batches(options, corpus, vocab_size), vocab_size=vocab_size)
        return {"accuracy": figures.next_token_accuracy, "lm_loss": figures.lm_loss}

    return on_text


def _batches(options: MaskingOptions, corpus: Corpus, vocab_size: int) -> Iterable[Tensor]:
    return corpus.batches(options.seq_length, options.batch_size, vocab_size, options.max_tokens)


def _tokenizer(options: MaskingOptions) -> Any:
    return open_tokenizer(options.teacher)


# ------------------------------------------------------------------------------------------------ results


def describe(result: dict[str, Any]) -> list[str]:
    """A table of scores, and on text one of LM losses."""
    where = "in the whole model" if result["scope"] == "model" else "in every layer"
    lines = [f"{result['num_neurons']} neurons {where} masked; score: {result['score']}"]
    names = {"accuracy": "score", "lm_loss": "LM loss"}
    for key in (key for key in names if key in result["models"]["teacher"]["unmasked"]):
        lines.append(f"{names[key]:<20}{'unmasked':>10}{'important':>11}{'random':>10}{'(std)':>10}")
        for model, found in result["models"].items():
            values = "".join(f"{found[c][key]:>{w}.4f}" for c, w in zip(CONDITIONS, (10, 11, 10), strict=True))
            lines.append(f"{model:<20}{values}{found['random'][key + '_std']:>10.4f}")
        if key == "accuracy":
            for model, values in PUBLISHED.items():
                lines.append(f"{'paper, ' + model:<20}{values[0]:>10.2f}{values[1]:>11.2f}{values[2]:>10.2f}")
    return lines


def draw(path: Path, result: dict[str, Any]) -> None:
    """Writes a PNG: three bars for each model, its scores under the three conditions."""
    places = range(len(result["models"]))
    with png_chart(path, inches=(6.5, 4.2)) as axes:
        for number, condition in enumerate(CONDITIONS):
            found = [model[condition] for model in result["models"].values()]
            bars = axes.bar(
                [place + 0.27 * (number - 1) for place in places],
                [score["accuracy"] for score in found],
                width=0.25,
                yerr=[score.get("accuracy_std", 0.0) for score in found],
                color=("tab:gray", "tab:red", "tab:blue")[number],
                label=condition if condition == "unmasked" else f"{condition} masked",
            )
            axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
        axes.set_xticks(list(places), list(result["models"]))
        axes.set(ylabel=f"score: {result['score']}")
        where = "" if result["scope"] == "model" else " per layer"
        axes.set_title(f"{result['num_neurons']} FFN neurons{where} masked", fontsize=11)
        axes.margins(y=0.12)
        axes.legend(fontsize=8, frameon=False)
