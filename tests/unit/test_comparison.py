"""tools/compare_methods.py: who competes, what tokens a loss needs, and what is written when runs are made up."""

import json
import math
import re
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_lrc.comparison import comparison_page as page
from megatron_lrc.comparison import contestants, figures, results
from megatron_lrc.comparison import result_tables as tables
from megatron_lrc.comparison import run_plan as plan
from megatron_lrc.comparison.contestants import ABLATED, CONTESTANTS, GROUPS, Contestant
from megatron_lrc.comparison.material import Material
from megatron_lrc.comparison.results import Reached, Result, tokens_to_reach
from megatron_lrc.comparison.run_plan import Sizes
from megatron_lrc.comparison.runner import Outcome
from megatron_lrc.config import ConfigError
from megatron_lrc.report.chart_files import write_charts

SIZES = Sizes(
    student_hidden_size=20,
    tokens=1000,
    seq_length=10,
    global_batch_size=10,
    ordinary_times=10,
    grid_times=1,
    validations=5,
    eval_iters=1,
)
MATERIAL = Material(Path("teacher"), ("--data-path", "data"), "A made-up teacher.")


def result(name: str, times: float, seed: int, points: list[tuple[float, float]], lr: float | None = None) -> Result:
    run = plan.make_run(CONTESTANTS[name], times, seed, lr, sizes=SIZES, material=MATERIAL)
    return Result(Outcome(run, Path(run.name)), tuple(points), 100.0 * seed, 9.0, 2.0, {"torch": "2"})


def ends(losses: dict[float, float], seed: int) -> list[Result]:
    """Ordinary training: times -> final loss."""
    return [result("ordinary", times, seed, [(0, 9), (times * 1000, loss)]) for times, loss in losses.items()]


# ---------------------------------------------------------------------------------------------------- tokens to a loss


def test_a_loss_between_two_points_is_reached_in_proportion_on_log_tokens():
    curve = [(0, 9.0), (100, 5.0), (1000, 4.0), (10000, 3.0)]
    assert tokens_to_reach(curve, 3.5).tokens == pytest.approx(1000 * math.sqrt(10))
    assert tokens_to_reach(curve, 4.0) == Reached(pytest.approx(1000))
    assert tokens_to_reach(curve, 3.0) == Reached(pytest.approx(10000))


def test_a_loss_below_the_curve_is_never_reached_and_one_above_it_at_the_first_point():
    curve = [(0, 9.0), (100, 5.0), (1000, 4.0)]
    assert tokens_to_reach(curve, 3.9) == Reached(1000, "never")
    assert tokens_to_reach(curve, 6.0) == Reached(100, "within")
    assert tokens_to_reach([(0, 3.0), (100, 2.0)], 4.0) == Reached(0, "within")


def test_the_first_crossing_counts_where_a_curve_rises_again():
    assert tokens_to_reach([(100, 5.0), (1000, 3.0), (2000, 4.0), (4000, 2.0)], 3.0).tokens == pytest.approx(1000)


def test_the_ratio_is_ordinary_trainings_tokens_over_the_contestants_seed_by_seed():
    runs = [
        result("lrc-pca", 1, 1, [(0, 9), (1000, 4.5)]),
        result("lrc-pca", 1, 2, [(0, 9), (1000, 3.5)]),
        *ends({1: 5.0, 10: 4.0}, seed=1),
        *ends({1: 5.0, 10: 4.0}, seed=2),
    ]
    groups = results.group(runs)
    lrc = groups[0]
    assert results.ratios(lrc, groups) == [Reached(pytest.approx(math.sqrt(10))), Reached(10.0, "never")]
    assert results.spread_reached(results.ratios(lrc, groups), tables.times_text) == "by seed: 3.16x, above 10x"
    assert results.spread_reached([Reached(10.0, "never")], tables.times_text) == "never within the run: above 10x"
    assert results.spread_reached([Reached(2.0), Reached(4.0)], tables.times_text) == "3x (2x to 4x)"
    assert results.spread_reached([Reached(1.0, "within")], tables.times_text) == "at most 1x"
    assert results.spread_reached([Reached(0, "within")], str) == "0, before training"
    assert results.default_target(groups) == 5.0


# ------------------------------------------------------------------------------------------------------- contestants


def test_an_unknown_contestant_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="unknown; did you mean lrc-pca"):
        contestants.choose(["lrc-pac"], [])


def test_a_contestant_with_flags_this_installation_lacks_is_refused_by_name():
    chosen = contestants.choose(["lrc-pca"], ["new=--init pca --no-such-flag 3", "odd=--init nonsense"])
    with pytest.raises(ConfigError) as caught:
        contestants.check(chosen)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and lines[0].startswith("contestant new (") and "unknown flag --no-such-flag" in lines[0]
    assert "contestant odd" in lines[1] and "'nonsense' is not one of random" in lines[1]


@pytest.mark.parametrize("text", ["nameless", "=--alpha 0", "a/b=--alpha 0", "lrc-pca=--alpha 0", "inits=--alpha 0"])
def test_an_added_contestant_needs_a_new_name_and_flags(text):
    with pytest.raises(ConfigError, match="--add"):
        contestants.choose([], [text])


def test_groups_hold_known_contestants_and_are_expanded_once():
    assert {name for group in GROUPS.values() for name in group} <= CONTESTANTS.keys()
    chosen = [one.name for one in contestants.choose(["lrc-pca", "headline"], ["mine=--alpha 0.7"])]
    assert chosen == ["lrc-pca", "lrc-random", "ordinary", "mine"]


def test_an_ablation_changes_one_thing_of_the_row_beside_it():
    base = CONTESTANTS[ABLATED].flags
    changes = [CONTESTANTS[name].flags.removeprefix(base).split() for name in GROUPS["ablations"][1:]]
    assert all(words and sum(word.startswith("--") for word in words) == 1 for words in changes)
    assert len({tuple(words) for words in changes}) == len(changes)
    contestants.check(contestants.choose(["headline", "ablations"], []))


# --------------------------------------------------------------------------------------------------------------- plan


def test_ordinary_training_has_a_run_for_each_budget_and_the_others_one():
    chosen = contestants.choose(["headline"], [])
    runs = plan.chosen_runs(chosen, [1, 2], {}, sizes=SIZES, material=MATERIAL)
    assert len({run.name for run in runs}) == len(runs) == 2 * (1 + 1 + 4)
    assert [run.steps for run in runs if run.contestant.name == "ordinary" and run.seed == 2] == [10, 20, 50, 100]
    rounded = replace(SIZES, tokens=977)
    assert [rounded.tokens_of(times) for times in (1, 2, 10)] == [1000, 2000, 10000]  # exact multiples
    for run in runs:
        assert run.flags[run.flags.index("--train-iters") + 1] == str(run.steps)


def test_the_grid_decides_the_learning_rate_and_longer_budgets_take_that_of_the_longest_in_it():
    ordinary = [CONTESTANTS["ordinary"]]
    grid = plan.grid_runs(ordinary, [0.1, 0.2], 1, sizes=SIZES, material=MATERIAL)
    assert [(run.times, run.lr, run.flags[-2:]) for run in grid] == [(1, lr, ("--lr", str(lr))) for lr in (0.1, 0.2)]
    tried = [result("ordinary", 1, 1, [(1000, loss)], lr) for lr, loss in ((0.1, 4.0), (0.2, 3.0), (0.3, math.inf))]
    best = results.best_rates(tried)
    assert best == {("ordinary", 1): 0.2}
    runs = plan.chosen_runs(ordinary, [1, 2], best, sizes=SIZES, material=MATERIAL)
    assert {run.lr for run in runs} == {0.2} and grid[1] in runs  # the grid's own run is not trained again


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.fixture
def found() -> tables.Comparison:
    runs = [
        *(result("lrc-pca", 1, seed, [(0, 9), (250, 7), (500, 5), (1000, 4 + seed / 10)]) for seed in (1, 2)),
        *(one for seed in (1, 2) for one in ends({1: 5.0, 10: 3.0 + seed / 10}, seed)),
    ]
    failed = Outcome(plan.make_run(Contestant("bad", "", ""), 1, 1, None, sizes=SIZES, material=MATERIAL), Path(), "no")
    grid = [result("ordinary", 1, 1, [(1000, loss)], lr) for lr, loss in ((0.1, 4.0), (0.2, 3.0))]
    best = results.best_rates(grid)
    return tables.Comparison(SIZES, MATERIAL, (1, 2), 2, 1, results.group(runs), grid, best, [failed], 5.0)


def test_the_table_has_spread_ratio_teacher_and_failures(found):
    names, rows = tables.main_table(found)
    cells = dict(zip(names, rows[0], strict=True))
    assert cells["held-out loss"] == "4.150 (4.100 to 4.200)" and cells["tokens/s"] == "150 (100 to 200)"
    assert cells["tokens to reach 5.000"] == "500 (500 to 500)"
    assert re.fullmatch(r"\S+x \(\S+x to \S+x\)", cells[names[5]])
    assert [row[0] for row in rows] == ["lrc-pca", "ordinary", "ordinary, 10 times the tokens", "(teacher)"]
    text = tables.table_md(found)
    assert "| bad-x1-seed1 | no |" in text and "3.000 *" in text
    assert json.loads(json.dumps(tables.as_values(found)))["contestants"][0]["loss"]["highest"] == 4.2


def test_the_page_is_self_contained_and_has_its_charts(found):
    text = page.render(found, datetime(2025, 1, 1, tzinfo=timezone.utc))
    assert text.count('<figure class="chart"') == 3 and text.count('class="band') >= 3
    assert not re.search(r'(?:src|href)="(?!data:)', text) and "http" not in text
    assert "4.150 (4.100 to 4.200)" in text


def test_the_file_of_curves_has_the_page_s_charts(found, tmp_path):
    write_charts(tmp_path / "curves.svg", figures.charts(found), title="Methods compared")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.svg"]
    drawn = {shape.get("d") for shape in ElementTree.parse(tmp_path / "curves.svg").iter() if shape.get("d")}
    on_page = re.findall(r'<path class="[^"]*" d="([^"]*)"', page.render(found, datetime.now(timezone.utc)))
    assert len(on_page) > 6 and drawn >= set(on_page)
