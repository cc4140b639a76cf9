"""The whole comparison: material, learning-rate grid, runs, figures. Everything is written to one folder:

OUTPUT/table.md, curves.svg, report.html, results.json
OUTPUT/runs/NAME/       run directories, as `train` writes them; OUTPUT/logs/NAME.log what they printed
OUTPUT/material-*/      the default teacher and data
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from megatron_lrc.comparison import comparison_page as page
from megatron_lrc.comparison import contestants, figures, results
from megatron_lrc.comparison import result_tables as tables
from megatron_lrc.comparison import run_plan as plan
from megatron_lrc.comparison.contestants import Contestant
from megatron_lrc.comparison.material import Material, TeacherSettings, make_material
from megatron_lrc.comparison.results import Result
from megatron_lrc.comparison.run_plan import Run, Sizes
from megatron_lrc.comparison.runner import Outcome, Runner, call_logged, flags_of
from megatron_lrc.config import ConfigError, parse_config, validate
from megatron_lrc.methods import method_of
from megatron_lrc.report.chart_files import write_charts
from megatron_lrc.whole_files import write_whole


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for. teacher, data: the user's own, or neither."""

    output: Path
    names: tuple[str, ...]
    added: tuple[str, ...]
    sizes: Sizes
    seeds: tuple[int, ...]
    lr_grid: tuple[float, ...]
    teacher: Path | None
    data: tuple[str, ...]
    made: TeacherSettings
    jobs: int
    threads: int
    target: float | None
    wants_curves: bool


def compare(options: Options, say: Callable[[str], None]) -> tables.Comparison:
    """Train what is not trained yet and write the figures. ConfigError before any run starts, or if none finished."""
    chosen = contestants.choose(options.names, options.added)
    contestants.check(chosen)
    options.output.mkdir(parents=True, exist_ok=True)
    material = _material(options, say)
    _check_flags(chosen, options, material)
    changed = material.newest_change()
    runner = Runner(options.output, jobs=options.jobs, threads=options.threads, material_time=changed, say=say)
    what = {"sizes": options.sizes, "material": material}
    grid_runs = plan.grid_runs(chosen, options.lr_grid, options.seeds[0], **what)
    grid = runner.train(grid_runs) if grid_runs else {}
    tried = _finished(grid_runs, grid)
    best = results.best_rates(tried)
    for (name, times), lr in best.items():
        say(f"learning rate of {name} at {times:g} times the tokens: {lr:g}")
    runs = plan.chosen_runs(chosen, options.seeds, best, **what)
    outcomes = grid | runner.train([run for run in runs if run.name not in grid])
    groups = results.group(_finished(runs, outcomes))
    failed = [outcome for outcome in outcomes.values() if outcome.failure]
    if not groups:
        raise ConfigError(f"no run finished. {failed[0].run.name}: {failed[0].failure}")
    target = options.target if options.target is not None else results.default_target(groups)
    found = tables.Comparison(
        options.sizes, material, options.seeds, options.jobs, options.threads, groups, tried, best, failed, target
    )
    _write(found, options)
    return found


def _material(options: Options, say: Callable[[str], None]) -> Material:
    if options.teacher is not None:
        return Material(options.teacher, options.data, "The teacher and the data are the user's own.")
    threads = options.jobs * options.threads  # alone on the machine, so all the cores that the runs would have had
    call = partial(call_logged, options.output / "logs", threads=threads, say=say)
    return make_material(options.output, options.made, call=call)


def _check_flags(chosen: Sequence[Contestant], options: Options, material: Material) -> None:
    """Refuse settings that no run could have, before the first one starts."""
    for one in chosen:
        run = plan.make_run(one, 1.0, options.seeds[0], None, sizes=options.sizes, material=material)
        try:
            config = parse_config(flags_of(run, options.output / "runs" / run.name))
            validate(method_of(config), world_size=1)
        except ConfigError as error:
            raise ConfigError(f"contestant {one.name}: {'; '.join(str(error).splitlines())}") from error


def _finished(runs: Sequence[Run], outcomes: dict[str, Outcome]) -> list[Result]:
    done = [outcomes[run.name] for run in runs]
    return [results.read_result(outcome) for outcome in done if not outcome.failure]


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
