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


def results_table(name: str, scores: Mapping[str, float], average: float | None) -> list[str]:
    """Lines: the published averages, and this model's scores (fractions by task) as percentages."""
    headings = [heading for heading, _ in NINE_TASKS.values()]
    rows = [[model, f"{value:.2f}", *[""] * len(headings)] for model, value in PUBLISHED_AVERAGES.items()]
    ours = [f"{100 * scores[task]:.2f}" if task in scores else "-" for task in NINE_TASKS]
    rows.append([name, "-" if average is None else f"{100 * average:.2f}", *ours])
    table = [["zero-shot, %", "average", *headings], *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    placed = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in table]
    return ["  ".join(cells).rstrip() for cells in placed]
