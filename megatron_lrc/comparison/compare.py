"""The whole comparison: material, learning-rate grid, runs, scores, figures. Everything is written to one folder:

OUTPUT/table.md, curves.svg, report.html, results.json      written again whenever a run has come to its end
OUTPUT/runs/NAME/       run directories, as `train` writes them, with evaluation.json; OUTPUT/logs/NAME.log what they
                        printed
OUTPUT/set-aside/       run directories of other settings, which were found in the place of one to be trained
OUTPUT/teacher-evaluation.json
OUTPUT/material-*/      the teacher and data that the comparison makes itself
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from megatron_lrc.comparison import comparison_page as page
from megatron_lrc.comparison import contestants, figures, results
from megatron_lrc.comparison import result_tables as tables
from megatron_lrc.comparison import run_plan as plan
from megatron_lrc.comparison.material import Material, TeacherSettings, described_material, make_material
from megatron_lrc.comparison.results import Result
from megatron_lrc.comparison.run_plan import Run, Sizes
from megatron_lrc.comparison.runner import Outcome, Runner, call_logged, flags_of
from megatron_lrc.comparison.scoring import Scoring, read_evaluation
from megatron_lrc.comparison.smollm2 import described_smollm2, make_smollm2
from megatron_lrc.comparison.workload import Workload
from megatron_lrc.config import ConfigError, parse_config, validate
from megatron_lrc.locks import FileLock
from megatron_lrc.methods import method_of
from megatron_lrc.report.chart_files import write_charts
from megatron_lrc.whole_files import write_whole

TEACHER_EVALUATION = "teacher-evaluation.json"


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """corpora: (name, prefix) of more held-out text than the material's. has_starts: untrained students are scored
    too. The others are those of `Scoring`."""

    corpora: tuple[tuple[str, str], ...] = ()
    tasks: tuple[str, ...] = ()
    tasks_dir: Path | None = None
    max_tokens: int = 0
    flags: tuple[str, ...] = ()
    has_starts: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for. own: the user's teacher and data, or None. made: the teacher to train without them;
    None: SmolLM2 is taken. rates: of `contestant.RATES`."""

    output: Path
    names: tuple[str, ...]
    added: tuple[str, ...]
    rates: str
    sizes: Sizes
    seeds: tuple[int, ...]
    lr_grid: tuple[float, ...]
    own: Material | None
    made: TeacherSettings | None
    scoring: ScoringOptions
    jobs: int
    threads: int
    max_hours: float | None
    target: float | None
    wants_curves: bool


class Comparing:
    """A comparison on its way: what it needs, and what there is of it."""

    def __init__(self, options: Options, material: Material, say: Callable[[str], None]):
        self.options, self.material, self.say = options, material, say
        self.chosen = contestants.choose(options.names, options.added, options.rates)
        scoring = options.scoring
        self.scoring = Scoring(
            material.teacher,
            (*((_name_of(prefix, material), prefix) for prefix in material.heldout), *scoring.corpora),
            scoring.tasks,
            scoring.tasks_dir,
            options.sizes.seq_length,
            scoring.max_tokens,
            scoring.flags,
        )
        deadline = {} if options.max_hours is None else {"deadline": time.monotonic() + 3600 * options.max_hours}
        self.runner = Runner(
            options.output,
            jobs=options.jobs,
            threads=options.threads,
            material_time=material.newest_change(),
            say=say,
            scoring=self.scoring,
            **deadline,
        )
        self.teacher_failure = ""
        self._what = {"sizes": options.sizes, "material": material}

    def check_flags(self) -> None:
        """Refuse settings that no run could have, before the first one starts."""
        for one in self.chosen:
            try:
                run = plan.make_run(one, 1.0, self.options.seeds[0], None, **self._what)
                config = parse_config(flags_of(run, self.runner.directory(run)))
                validate(method_of(config), world_size=1)
            except ConfigError as error:
                raise ConfigError(f"contestant {one.name}: {'; '.join(str(error).splitlines())}") from error

    def grid_runs(self) -> list[Run]:
        options = self.options
        return plan.grid_runs(self.chosen, options.lr_grid, options.seeds[0], **self._what)

    def start_runs(self) -> list[Run]:
        if not self.options.scoring.has_starts:
            return []
        return plan.start_runs(self.chosen, self.options.seeds[0], **self._what)

    def chosen_runs(self, best: dict[tuple[str, float], float]) -> list[Run]:
        return plan.chosen_runs(self.chosen, self.options.seeds, best, **self._what)

    def finished(self, runs: Sequence[Run]) -> list[Result]:
        """Those that are in the output already, whatever else there is to do."""
        return [results.read_result(Outcome(run, self.runner.directory(run))) for run in runs if self._is_trained(run)]

    def _is_trained(self, run: Run) -> bool:
        return self.runner.is_done(run, scored=False)

    def workload(self) -> Workload:
        """What is done, and what there is to do; the grid's rates as far as it has been run."""
        grid = self.grid_runs()
        runs = self.chosen_runs(results.best_rates(self.finished(grid)))
        return Workload.of(grid, [*self.start_runs(), *runs], self.runner, self.options.jobs)

    def found(self, grid: Sequence[Result], outcomes: dict[str, Outcome], runs: Sequence[Run]) -> tables.Comparison:
        """What the runs came to, of those that are finished. ConfigError if none is."""
        options = self.options
        failed = [outcome for outcome in outcomes.values() if outcome.failure or outcome.unscored]
        groups = results.group(self.finished(runs))
        if not groups and failed:
            raise ConfigError(f"no run finished. {failed[0].run.name}: {failed[0].failure}")
        return tables.Comparison(
            sizes=options.sizes,
            material=self.material,
            seeds=options.seeds,
            jobs=options.jobs,
            threads=options.threads,
            groups=groups,
            starts=results.group(self.finished(self.start_runs())),
            grid=list(grid),
            best=results.best_rates(grid),
            failed=[outcome for outcome in failed if not outcome.is_stopped],
            target=options.target if options.target is not None else results.default_target(groups),
            scoring=self.scoring,
            teacher=read_evaluation(options.output / TEACHER_EVALUATION),
            teacher_failure="" if self.runner.is_stopped else self.teacher_failure,
            is_stopped=self.runner.is_stopped and self._has_something_left(outcomes),
        )

    def score_teacher(self) -> None:
        self.teacher_failure = self.runner.score_teacher(self.options.output / TEACHER_EVALUATION)

    def _has_something_left(self, outcomes: dict[str, Outcome]) -> bool:
        missing = self.scoring.missing(self.options.output / TEACHER_EVALUATION, "teacher")
        return bool(missing) or any(outcome.is_stopped for outcome in outcomes.values())


def compare(options: Options, say: Callable[[str], None]) -> tables.Comparison:
    """Do what is not done yet and write the figures. ConfigError before any run starts, or if none finished."""
    contestants.check(contestants.choose(options.names, options.added, options.rates))
    output, remedy = options.output, "Wait until it has ended, or give another folder."
    with FileLock(output / ".lock", place=f"--output {output}", remedy=remedy):
        return _compare(options, say)


def _compare(options: Options, say: Callable[[str], None]) -> tables.Comparison:
    comparing = Comparing(options, _material(options, say), say)
    comparing.check_flags()
    runner = comparing.runner
    grid_runs = comparing.grid_runs()
    outcomes = runner.train(grid_runs, scored=False) if grid_runs else {}
    grid = comparing.finished(grid_runs)
    best = results.best_rates(grid)
    for (name, times), lr in best.items():
        say(f"learning rate of {name} at {times:g} times the tokens: {lr:g}")
    comparing.score_teacher()
    runs = comparing.chosen_runs(best)

    def write(so_far: dict[str, Outcome]) -> None:
        found = comparing.found(grid, outcomes | so_far, runs)
        if found.groups:
            _write(found, options)

    outcomes |= runner.train([*runs, *comparing.start_runs()], after=write)
    found = comparing.found(grid, outcomes, runs)
    if found.groups:
        _write(found, options)
    return found


def workload(options: Options, say: Callable[[str], None]) -> Workload:
    """What `compare` would do, without doing any of it."""
    contestants.check(contestants.choose(options.names, options.added, options.rates))
    if options.own is not None:
        material = options.own
    elif options.made is not None:
        material = described_material(options.output, options.made)
    else:
        material = described_smollm2(options.output)
    return Comparing(options, material, say).workload()


def _material(options: Options, say: Callable[[str], None]) -> Material:
    if options.own is not None:
        return options.own
    threads = options.jobs * options.threads  # alone on the machine, so all the cores that the runs would have had
    call = partial(call_logged, options.output / "logs", threads=threads, say=say)
    if options.made is None:
        return make_smollm2(options.output, call=call)
    return make_material(options.output, options.made, call=call)


def _name_of(prefix: str, material: Material) -> str:
    """Of a held-out dataset in tables."""
    return "held-out" if len(material.heldout) == 1 else Path(prefix).name.removesuffix("_text_document")


def _write(found: tables.Comparison, options: Options) -> None:
    now = datetime.now(timezone.utc)
    texts = {
        "results.json": json.dumps({"time": now.isoformat(timespec="seconds")} | tables.as_values(found), indent=1),
        "table.md": tables.table_md(found),
        "report.html": page.render(found, now),
    }
    for name, text in texts.items():
        write_whole(options.output / name, text)
    if options.wants_curves:
        path, seeds = options.output / "curves.svg", ", ".join(map(str, found.seeds))
        write_charts(path, figures.charts(found), title="Methods compared", note=f"seeds: {seeds}")
