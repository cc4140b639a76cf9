"""The comparison's figures as rows of text, for table.md and the page; and all of them as plain values."""

import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_lrc import __version__
from megatron_lrc.comparison import results
from megatron_lrc.comparison.material import Material
from megatron_lrc.comparison.results import Group, Reached, Result
from megatron_lrc.comparison.run_plan import Sizes
from megatron_lrc.comparison.runner import Outcome
from megatron_lrc.comparison.score_tables import as_values as scores_as_values
from megatron_lrc.comparison.score_tables import score_sections
from megatron_lrc.comparison.scoring import Scoring
from megatron_lrc.report.run_tables import names_and_cells
from megatron_lrc.train.progress import count

Rows = tuple[list[str], list[list[str]]]  # names of the columns, cells


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that a comparison came to, or has come to so far. starts: students before training, scored. grid: the runs
    of the learning-rate grid. target: loss of `tokens to`. teacher: its own scores; teacher_failure: why there
    are not all of them. is_stopped: the time was over."""

    sizes: Sizes
    material: Material
    seeds: tuple[int, ...]
    jobs: int
    threads: int
    groups: list[Group]
    grid: list[Result]
    best: dict[tuple[str, float], float]
    failed: list[Outcome]
    target: float
    scoring: Scoring
    starts: list[Group] = field(default_factory=list)
    teacher: dict[str, Any] = field(default_factory=dict)
    teacher_failure: str = ""
    is_stopped: bool = False

    @property
    def teacher_loss(self) -> float | None:
        found = [r.teacher_loss for one in self.groups for r in one.results if r.teacher_loss is not None]
        return found[0] if found else None


def loss_text(value: float) -> str:
    return f"{value:.3f}"


def times_text(value: float) -> str:
    return f"{value:.3g}x"


def main_table(found: Comparison) -> Rows:
    """A row for each contestant and budget, then the teacher."""
    rows = []
    for one in found.groups:
        is_ordinary = one.name == results.ORDINARY
        own = results.spread_reached(results.own_tokens(one, found.groups, found.target), count)
        ratio = results.spread_reached(results.ratios(one, found.groups), times_text)
        row = {
            "contestant": one.name if one.times == 1 else f"{one.name}, {one.times:g} times the tokens",
            "tokens": count(one.tokens),
            "before training": results.spread(one.first_losses, loss_text) if one.first_losses else "",
            "held-out loss": results.spread(one.losses, loss_text),
            "tokens/s": results.spread(one.rates, count),
            f"tokens to reach {loss_text(found.target)}": own if not is_ordinary or one.times == 1 else "",
            "ordinary training needs, in multiples of this contestant's tokens": "" if is_ordinary else ratio,
            "learning rate": rate_text(one),
        }
        rows.append(row)
    if found.teacher_loss is not None:
        teacher = {"contestant": "(teacher)", "held-out loss": loss_text(found.teacher_loss)}
        rows.append(dict.fromkeys(rows[0], "") | teacher)
    return names_and_cells(rows)


def rate_text(one: Group) -> str:
    run = one.results[0].outcome.run
    words = run.flags
    given = [words[place + 1] for place, word in enumerate(words) if word == "--lr"]
    return f"{float(given[-1]):g}" + (" (grid)" if run.lr is not None else "") if given else "default"


def grid_table(found: Comparison) -> Rows:
    """Held-out loss of every contestant and budget at every learning rate of the grid; * marks the one taken."""
    rates = sorted({r.outcome.run.lr for r in found.grid if r.outcome.run.lr is not None})
    rows = []
    for one in results.group(found.grid):
        losses = {r.outcome.run.lr: r.loss for r in one.results}
        best = found.best.get((one.name, one.times))
        cells = [
            loss_text(losses[rate]) + (" *" if rate == best else "") if rate in losses else "failed" for rate in rates
        ]
        rows.append([one.name, count(one.tokens), *cells])
    return ["contestant", "tokens", *(f"{rate:g}" for rate in rates)], rows


def run_table(found: Comparison) -> Rows:
    """Every run with its own flags."""
    rows = [
        {
            "run": result.outcome.run.name,
            "held-out loss": loss_text(result.loss),
            "seconds of training steps": f"{result.seconds:.0f}",
            "contestant's flags": result.outcome.run.contestant.flags,
            "what it is": one.about,
        }
        for one in found.groups
        for result in one.results
    ]
    return names_and_cells(rows)


def failures(found: Comparison) -> Rows:
    return ["run that failed", "its last line"], [[one.run.name, one.failure or one.unscored] for one in found.failed]


def notes(found: Comparison) -> list[str]:
    """How to read the table, in sentences."""
    sizes, seeds = found.sizes, found.seeds
    spread = (
        f"Each figure is the mean over {len(seeds)} seeds ({', '.join(map(str, seeds))}), with the lowest and the "
        "highest in brackets."
        if len(seeds) > 1
        else f"One seed ({', '.join(map(str, seeds))}): no spread is known; small differences may be chance."
    )
    return [
        f"Students have hidden size {sizes.student_hidden_size} and see sequences of {sizes.seq_length} tokens, "
        f"{sizes.global_batch_size} per step. {found.material.note} A seed sets both the order of the data, alike for "
        "all contestants, and the initialisation.",
        spread,
        "Held-out loss is the LM loss in nats per token on the same held-out sequences for all. Each row is of runs "
        "whose learning-rate schedule ends at its tokens: ordinary training has runs of its own for every budget.",
        "`Ordinary training needs`: the tokens at which ordinary training reaches the contestant's final loss, between "
        "the ends of its runs by proportion on a logarithmic axis, over the contestant's tokens. `never within the "
        "run` means that its longest run ended above that loss, so that it needs more than the bound.",
        f"`Tokens to reach {loss_text(found.target)}`: of contestants with one budget along their runs, where the "
        "learning rate has not yet decayed; they might need fewer.",
        f"Tokens/s were measured with {found.jobs} runs at a time, {found.threads} thread(s) each, on this machine; "
        "they compare the methods only if nothing else ran on it.",
    ]


def markdown(rows: Rows) -> str:
    names, cells = rows
    lines = [names, ["---"] * len(names), *cells]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def sections(found: Comparison) -> list[tuple[str, Rows]]:
    """Title and table, those with rows."""
    given = [
        ("Comparison", main_table(found)),
        *score_sections(found.groups, found.starts, found.scoring, found.teacher),
        ("Learning rates tried", grid_table(found)),
        ("Failed runs", failures(found)),
        ("Runs", run_table(found)),
    ]
    return [(title, rows) for title, rows in given if rows[1]]  # of those with rows


def table_md(found: Comparison) -> str:
    parts = [f"# {title}\n\n{markdown(rows)}" for title, rows in sections(found)]
    parts.insert(1, "\n".join(f"* {note}" for note in notes(found)) + "\n")
    return "\n".join(parts)


def as_values(found: Comparison) -> dict[str, Any]:
    """Everything, for results.json."""
    return {
        "megatron_lrc": __version__,
        "python": platform.python_version(),
        "sizes": asdict(found.sizes),
        "teacher": str(found.material.teacher),
        "data": list(found.material.data),
        "note": found.material.note,
        "seeds": list(found.seeds),
        "jobs": found.jobs,
        "threads": found.threads,
        "teacher_loss": found.teacher_loss,
        "target_loss": found.target,
        "is_stopped": found.is_stopped,
        "teacher_scores": scores_as_values(found.teacher, found.scoring),
        "contestants": [_group(one, found) for one in found.groups],
        "starts": [
            {"name": one.name, "about": one.about, "runs": [_result(result, found.scoring) for result in one.results]}
            for one in found.starts
        ],
        "grid": [_result(result, found.scoring) for result in found.grid],
        "failed": [
            {"run": one.run.name, "flags": list(one.run.flags), "reason": one.failure or one.unscored}
            for one in found.failed
        ],
    }


def _group(one: Group, found: Comparison) -> dict[str, Any]:
    return {
        "name": one.name,
        "about": one.about,
        "times": one.times,
        "tokens": one.tokens,
        "loss": _spread(one.losses),
        "tokens_per_second": _spread(one.rates),
        "tokens_to_target": [_reached(value) for value in results.own_tokens(one, found.groups, found.target)],
        "ordinary_needs_times": []
        if one.name == results.ORDINARY
        else [_reached(value) for value in results.ratios(one, found.groups)],
        "runs": [_result(result, found.scoring) for result in one.results],
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "lowest": min(values), "highest": max(values)}


def _reached(value: Reached) -> dict[str, Any]:
    return {"value": value.tokens, "kind": value.kind}


def _result(result: Result, scoring: Scoring) -> dict[str, Any]:
    run = result.outcome.run
    return {
        "run": run.name,
        "seed": run.seed,
        "grid_lr": run.lr,
        "flags": list(run.flags),
        "tokens": run.tokens,
        "loss": result.loss,
        "points": [list(point) for point in result.points],
        "tokens_per_second": result.tokens_per_second if math.isfinite(result.tokens_per_second) else None,
        "seconds": result.seconds,
        "versions": result.versions,
        "last_validation": result.last,
        "scores": scores_as_values(result.evaluation, scoring),
    }
