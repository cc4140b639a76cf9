"""The nine tasks of the paper, and its zero-shot averages over them, to stand beside ours (arXiv 2505.12781)."""

from collections.abc import Mapping

#: Task of lm-evaluation-harness -> (heading, metric). Zero-shot, as the released code's evaluation script has it.
NINE_TASKS = {
    "arc_easy": ("ARC-E", "acc"),
    "arc_challenge": ("ARC-C", "acc_norm"),
    "logiqa": ("LogiQA", "acc_norm"),
    "commonsense_qa": ("CSQA", "acc"),
    "piqa": ("PIQA", "acc"),
    "winogrande": ("WinoG", "acc"),
    "boolq": ("BoolQ", "acc"),
    "sciq": ("SciQ", "acc"),
    "mmlu": ("MMLU", "acc"),
}

#: Model -> average over the nine tasks, in percent.
PUBLISHED_AVERAGES = {
    "LRC-4B": 70.30,
    "Qwen3-4B": 70.29,
    "Gemma3-4B": 69.43,
    "Minitron-4B": 68.31,
    "LRC-1.7B": 64.98,
    "LRC-1.5B": 63.48,
    "LRC-2.7B-B": 52.67,
    "Sheared-Llama-2.7B-B": 52.55,
}


def average_of(scores: Mapping[str, float]) -> float | None:
    """Mean over the nine tasks, each counting once, in the scores' unit; None unless all nine are there."""
    if any(task not in scores for task in NINE_TASKS):
        return None
    return sum(scores[task] for task in NINE_TASKS) / len(NINE_TASKS)


def published_averages(name: str, average: float | None) -> list[str]:
    """Lines: the averages over the nine tasks that the paper gives, in percent, and this model's (a fraction)."""
    rows = [("zero-shot average of the nine, %", ""), *((model, f"{v:.2f}") for model, v in PUBLISHED_AVERAGES.items())]
    rows.append((name, "-" if average is None else f"{100 * average:.2f}"))
    width = max(len(model) for model, _ in rows)
    return [f"{model:{width}}  {value:>5}".rstrip() for model, value in rows]
