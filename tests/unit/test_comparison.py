"""tools/compare_methods.py: who competes, what tokens a loss needs, and what is written when runs are made up."""

import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_lrc.commands.compare_methods import options_of, read_flags
from megatron_lrc.comparison import compare, contestants, figures, results, runner
from megatron_lrc.comparison import comparison_page as page
from megatron_lrc.comparison import result_tables as tables
from megatron_lrc.comparison import run_plan as plan
from megatron_lrc.comparison.ablations import ABLATED, PAPER, with_layers
from megatron_lrc.comparison.contestant import PRETRAINED, RATES, Contestant
from megatron_lrc.comparison.contestants import GROUPS
from megatron_lrc.comparison.material import Material
from megatron_lrc.comparison.results import Reached, Result, tokens_to_reach
from megatron_lrc.comparison.run_plan import Sizes
from megatron_lrc.comparison.runner import Outcome
from megatron_lrc.comparison.score_tables import score_sections
from megatron_lrc.comparison.scoring import Scoring, score
from megatron_lrc.comparison.smollm2 import described_smollm2, make_smollm2
from megatron_lrc.config import ConfigError
from megatron_lrc.locks import FileLock, lock_of_run
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
CONTESTANTS = contestants.contestants()
SCORING = Scoring(Path("teacher"), corpora=(("english", "data/english"),), tasks=("piqa",))
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


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("group", ["ablations", "paper-ablations", "layers", "alphas"])
def test_an_ablation_changes_one_thing_of_the_row_beside_it(group, rates):
    known = contestants.contestants(rates)
    base = ABLATED if group == "ablations" else PAPER
    assert base in GROUPS[group]
    others = [known[name].flags for name in GROUPS[group] if name != base]
    assert all(flags.startswith(known[base].flags) for flags in others)
    changes = [flags.removeprefix(known[base].flags).split() for flags in others]
    assert all(words and sum(word.startswith("--") for word in words) == 1 for words in changes)
    assert len({tuple(words) for words in changes}) == len(changes)


def test_every_contestant_s_flags_are_this_installation_s():
    for rates in RATES:
        contestants.check(list(contestants.contestants(rates).values()))


def test_a_pretrained_teacher_has_rates_of_its_own():
    chosen = contestants.choose(["pretrained"], [], PRETRAINED)
    flags = {one.name: one.flags.split() for one in chosen}
    assert flags.pop("lrc-recommended") == ["--preset", "recommended"]  # which has a rate
    rates = {name: words[words.index("--lr") + 1] for name, words in flags.items()}
    assert rates["lrc-opened"] == "2e-5" and rates["lrc-random"] == "3e-4"


@pytest.mark.parametrize(
    ("num_layers", "half", "eighth"),
    [(30, "1,3,5,7,9,11,13,15,17,19,21,23,25,27,29", "7,15,23"), (4, "1,3", "3"), (1, "0", "0")],
)
def test_a_share_of_the_layers_is_spread_evenly_and_never_empty(num_layers, half, eighth):
    assert with_layers("--clone-terms q:{half} k:{eighth}", num_layers) == f"--clone-terms q:{half} k:{eighth}"


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


def test_a_micro_batch_is_as_much_of_the_batch_as_fits():
    sizes = replace(SIZES, seq_length=256, global_batch_size=24)
    assert sizes.sequences_at_once == 12  # 4,096 tokens are 16 sequences, which do not divide 24
    assert replace(sizes, seq_length=8192).sequences_at_once == 1
    run = plan.make_run(CONTESTANTS["lrc-pca"], 1, 1, None, sizes=replace(sizes, micro_batch_size=3), material=MATERIAL)
    assert run.flags[run.flags.index("--micro-batch-size") + 1] == "3"


def test_contestants_that_start_alike_have_one_untrained_student():
    chosen = contestants.choose(
        ["lrc-channel", "minitron", "ordinary", "lrc-pca", "logits", "sheared", "lrc-opened"], []
    )
    starts = plan.start_runs(chosen, 3, sizes=SIZES, material=MATERIAL)
    assert [run.name for run in starts] == ["lrc-channel-x0-seed3", "ordinary-x0-seed3", "lrc-pca-x0-seed3"]
    assert starts[0].contestant.about == "start of lrc-channel, minitron"
    assert [run.kind for run in starts] == ["clone", "student", "clone"]
    assert {run.flags[run.flags.index("--train-iters") + 1] for run in starts} == {"0"}


def test_what_is_remembered_beside_a_teacher_does_not_make_its_runs_old(tmp_path):
    for number, name in enumerate(["model.safetensors", "data.bin", ".megatron_lrc_hashes.json"], 1):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (number, number))
    assert Material(tmp_path, ("--data-path", str(tmp_path / "data")), "").newest_change() == 2


def test_the_pretrained_material_is_made_once_where_it_is_described(tmp_path):
    called = []

    def call(name: str, command: list[str]) -> None:
        """Stands in for the download and the programs."""
        called.append(name)
        if name == "teacher":
            teacher = Path(command[-1])
            teacher.mkdir()
            (teacher / "config.json").write_text('{"num_hidden_layers": 30}')
        elif name == "text":
            Path(command[-1]).mkdir()
            (Path(command[-1]) / "heldout.jsonl").write_text("")
        else:
            prefix = command[command.index("--output-prefix") + 1]
            Path(f"{prefix}_text_document.json").write_text("")

    made = make_smollm2(tmp_path, call=call)
    assert called == ["teacher", "text", "index-train", "index-heldout"]
    assert make_smollm2(tmp_path, call=call) == made == described_smollm2(tmp_path) and len(called) == 4
    assert made.heldout == (f"{tmp_path}/material-smollm2/heldout_text_document",) and made.num_layers == 30


def test_at_the_deadline_what_is_under_way_is_asked_to_end_and_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0.0)
    start = time.monotonic()
    what = {"jobs": 1, "threads": 1, "material_time": 0.0, "say": print, "scoring": SCORING}
    short = runner.Runner(tmp_path, deadline=start + 0.5, **what)
    with short._stopped_at_deadline():
        assert short._call([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log") == -signal.SIGTERM
    assert short.is_stopped and time.monotonic() - start < 30
    assert short._call([sys.executable, "-c", ""], tmp_path / "log") == runner.STOPPED


# ------------------------------------------------------------------------------------------------------------ scores


def fake_evaluate(asked: list[list[str]], *, fails_at: str = ""):
    """Stands in for the processes: writes what they would write."""

    def call(command) -> int:
        words = list(command)
        asked.append(words)
        if fails_at and fails_at in words:
            return 1
        found = {"tasks": {"scores": {"piqa": 0.667}, "stderr": {"piqa": 0.011}, "bits_per_byte": {"piqa": 1.2}}}
        if "--data-path" in words:
            figures = {"lm_loss": 4.0, "kl": 0.5, "top1_agreement": 0.6, "teacher_lm_loss": 3.3}
            found = {"heldout": {"figures": {"data/english": figures}}}
        elif "megatron_lrc.evaluation.projections" in words:
            found = {"matrices": 2, "effective_rank": 11.5, "condition": None}
        Path(words[-1]).write_text(json.dumps(found))
        return 0

    return call


def test_a_student_is_scored_part_by_part_and_no_part_twice(tmp_path):
    record, asked = tmp_path / "evaluation.json", []
    assert score(tmp_path, record, "clone", SCORING, fake_evaluate(asked, fails_at="piqa")) == "task piqa"
    assert len(asked) == 3 and set(json.loads(record.read_text())) == {"projections", "text english"}
    assert asked[1][-2] == "--output" and asked[1][asked[1].index("--teacher") + 1] == "teacher"
    asked.clear()
    assert score(tmp_path, record, "clone", SCORING, fake_evaluate(asked)) == ""
    assert ["piqa" in words for words in asked] == [True]
    assert score(tmp_path, record, "clone", SCORING, fake_evaluate(asked)) == "" and len(asked) == 1
    more = replace(SCORING, tasks=("piqa", "sciq"), max_tokens=5)  # the text is another question now
    assert list(more.missing(record, "clone")) == ["text english", "task sciq"]
    nothing = tmp_path / "nothing.json"
    assert list(SCORING.missing(nothing, "student")) == ["text english", "task piqa"]
    assert list(SCORING.missing(nothing, "teacher")) == ["task piqa"]


def test_tables_show_scores_with_spread_standard_error_starts_and_teacher(tmp_path):
    record = tmp_path / "evaluation.json"
    score(tmp_path, record, "clone", SCORING, fake_evaluate([]))
    scores = json.loads(record.read_text())
    runs = [replace(result("lrc-pca", 1, seed, [(0, 9), (1000, 4)]), evaluation=scores) for seed in (1, 2)]
    other = json.loads(json.dumps(scores).replace("0.667", "0.687"))
    runs[1] = replace(runs[1], evaluation=other)
    (one,), (start,) = (
        results.group(runs),
        results.group([replace(result("lrc-pca", 0, 1, [(0, 9)]), evaluation=scores)]),
    )
    sections = dict(score_sections([one], [start], SCORING, scores))
    names, rows = sections["Held-out text"]
    cells = dict(zip(names, rows[0], strict=True))
    assert cells["english: LM loss"] == "4.000 (4.000 to 4.000)" and cells["english: top-1"].startswith("60.0 %")
    assert dict(zip(names, rows[-1], strict=True))["english: LM loss"] == "3.300"
    names, rows = sections["Tasks"]
    assert [row[:4] for row in rows] == [
        ["lrc-pca", "1K", "2", "67.7 (66.7 to 68.7) ± 1.1"],
        [f"before training: {start.about}", "0", "1", "66.7 ± 1.1"],
        ["(teacher)", "", "", "66.7 ± 1.1"],
    ]
    assert sections["Bits per byte of the right answers"][1][0][3] == "1.200 (1.200 to 1.200)"
    assert sections["Projections at the end"][1][0][-2:] == ["11.5 (11.5 to 11.5)", "infinite"]


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
    return tables.Comparison(SIZES, MATERIAL, (1, 2), 2, 1, results.group(runs), grid, best, [failed], 5.0, SCORING)


def test_the_table_has_spread_ratio_teacher_and_failures(found):
    names, rows = tables.main_table(found)
    cells = dict(zip(names, rows[0], strict=True))
    assert cells["held-out loss"] == "4.150 (4.100 to 4.200)" and cells["tokens/s"] == "150 (100 to 200)"
    assert cells["tokens to reach 5.000"] == "500 (500 to 500)"
    assert cells["before training"] == "9.000 (9.000 to 9.000)"
    assert re.fullmatch(r"\S+x \(\S+x to \S+x\)", cells[names[6]])
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


def test_a_second_comparison_in_the_folder_is_refused(tmp_path):
    """It would set aside the runs of the first."""
    options = options_of(read_flags(["--output", str(tmp_path)], "compare"))
    with (
        FileLock(tmp_path / ".lock", place="", remedy=""),
        pytest.raises(ConfigError, match=f"--output {tmp_path} is being written by another process"),
    ):
        compare.compare(options, print)


def test_a_run_that_a_killed_comparison_has_left_behind_is_not_removed_under_its_hands(tmp_path):
    run = plan.make_run(CONTESTANTS["ordinary"], 1, 1, None, sizes=SIZES, material=MATERIAL)
    one = runner.Runner(tmp_path, jobs=1, threads=1, material_time=0.0, say=print, scoring=SCORING)
    with (
        lock_of_run(one.directory(run)),
        pytest.raises(ConfigError, match=f"--save {one.directory(run)} is being written by another process"),
    ):
        one.train([run])
    assert one.directory(run).is_dir()
