"""The report's page: whole without network and scripts, of any run directory, whatever is missing in it."""

import json
import math
import random
import re
import subprocess
import sys
from datetime import datetime, timezone
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lrc.config import CLONE_TERMS, Config, save_yaml
from megatron_lrc.report import charts, png
from megatron_lrc.report.chart_axes import Axis, number, tick_text
from megatron_lrc.report.run_files import read_run
from megatron_lrc.report.run_page import render
from megatron_lrc.report.thinning import MAX_BUCKETS, MAX_COLUMNS, average_rows, thin
from tools_path import tool_main

NOW = datetime(2025, 2, 1, 12, 0, 0, tzinfo=timezone.utc)
VOID = {"meta", "img", "line", "br"}  # <line> closes itself
SECTIONS = ["Losses", "Clone loss by layer", "Learning rate and gradients", "Throughput and memory"]
SECTIONS += ["Effective rank", "Starts", "Configuration"]


class Page(HTMLParser):
    """Checks that tags are balanced and collects what a browser would fetch, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def training_record(step: int, *, layers: int = 4) -> dict:
    loss = 3 + math.exp(-step / 40)
    return {
        "step": step,
        "tokens": 1000 * step,
        "loss": 2 * loss,
        "lm_loss": loss,
        "kl_loss": loss / 10,
        "clone_loss": 100 / step,
        "teacher_lm_loss": 2.5,
        "clone_by_layer": {term: [1.0 / (step + layer + 1) for layer in range(layers)] for term in CLONE_TERMS},
        "skipped_steps": 0,
        "grad_norm": 0.5 + step % 3,
        "grad_norm_by_group": {"q": 0.3, "embed": 0.4, "lm_head": None},
        "lr": 1e-4,
        "step_seconds": 2.0,
        "memory_gib": {"peak": 61.0, "now": 60.0},
        "straggler": {"rank": 3, "host": "n", "data_seconds": 0.1, "compute_seconds": 1, "peers_seconds": 1.05},
        "tokens_per_second": 500.0,
        "tflops": {"teacher_forward": 200.0, "student_forward": 90.0, "student_backward": 110.0, "projections": 5.0}
        | {"total": 405.0},
        "time": f"2025-02-01T{step // 3600 % 12:02d}:{step // 60 % 60:02d}:{step % 60:02d}+00:00",
    }


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def start(step: int, **changes) -> dict:
    layout = {"tp": 2, "pp": 1, "cp": 1, "dp": 4}
    line = {"time": "2025-02-01T00:00:00+00:00", "step": step, "train_iters": 200, "checkpoint": None, "lost_steps": 0}
    line |= {"lost_seconds": 0.0, "world_size": 8, "hosts": 1, "layout": layout, "versions": {"torch": "2.6"}}
    return {**line, **changes}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of 200 steps, two thirds through, with a restart."""
    folder = tmp_path / "lrc"
    folder.mkdir()
    write_lines(folder / "metrics.jsonl", [training_record(step) for step in range(10, 141, 10)])
    losses = {"loss": 7.0, "lm_loss": 3.5, "kl_loss": 0.4, "clone_loss": 9.0, "teacher_lm_loss": 2.5}
    ranks = {"effective_rank": {"teacher": [9.0, 8.0], "student": [5.0, 4.0]}}
    validations = [{"step": step, "tokens": 1000 * step, **losses, **ranks} for step in (0, 50, 100)]
    write_lines(folder / "validation.jsonl", [{**validations[0], "lm_loss": 4.5}, *validations[1:]])
    checkpoint = str(folder / "iter_0000080")
    write_lines(folder / "starts.jsonl", [start(0), start(80, checkpoint=checkpoint, lost_steps=17, lost_seconds=34.0)])
    config = Config()
    config.model.teacher, config.model.student_hidden_size = "teachers/large", 1536
    config.training.train_iters, config.training.global_batch_size = 200, 64
    save_yaml(config, folder / "config.yaml")
    return folder


def page_of(run: Path) -> str:
    return render(read_run(run), NOW)


def test_the_page_has_every_section_and_asks_nothing_of_the_network(run):
    html = page_of(run)
    page = Page(html)
    for section in SECTIONS:
        assert f"<h2>{section}</h2>" in html
    assert page.fetched and all(source.startswith("data:image/png;base64,") for source in page.fetched)
    assert "://" not in html and "@import" not in html and "url(" not in html
    assert page.tags.count("svg") >= 11 and html.count('class="heat"') == 7


def test_the_page_shows_what_a_watch_has_found_of_checkpoints(run):
    assert "<h2>Evaluations</h2>" not in page_of(run)
    records = [
        {
            "step": step,
            "tokens": 1000 * step,
            "heldout": {"<english>.jsonl": {"lm_loss": 4.25 - step / 100, "kl": 0.5, "top1_agreement": 0.625}},
            "tasks": {
                "scores": {"piqa": 0.5 + step / 1000},
                "stderr": {"piqa": 0.0123},
                "bits_per_byte": {"piqa": 1.375},
                "bits_per_byte_stderr": {"piqa": None},
            },
        }
        for step in (50, 100)
    ]
    write_lines(run / "evaluations.jsonl", records)
    part = page_of(run).split("<h2>Evaluations</h2>")[1].split("<section>")[0]
    cells = re.findall(r"<td>(.*?)</td>", part)
    assert cells[len(cells) // 2 :] == ["100", "100K", "3.25", "0.5", "0.625", "0.6 +- 0.0123", "1.375"]
    assert part.count("<svg") == 3 and "piqa" in part and "<english>" not in part
    write_lines(run / "evaluations.jsonl", [{"step": 50, "tokens": 1000}, {"step": 100, "tokens": 2000, "tasks": None}])
    assert re.findall(r"<td>(.*?)</td>", page_of(run).split("<h2>Evaluations</h2>")[1])[:4] == ["50", "1K", "100", "2K"]


def test_the_page_says_how_far_the_run_is_and_what_was_lost(run):
    text = Page(page_of(run)).text
    assert "step 140 of 200 (70.0%)" in text and "under way" in text and "finished" not in text
    assert "2m00s of training left" in text  # 60 steps of 2 s
    assert (
        "17 steps lost" in text and "50% of the way to the teacher's 2.500" in text
    )  # 4.5 -> 3.5, the teacher's is 2.5
    first_row = ["1", "2025-02-01 00:00:00", "0", "97", "-", "0"]  # it had come to step 97 when it died
    cells = re.findall(r"<td>(.*?)</td>", page_of(run).split("<h2>Starts</h2>")[1])
    assert cells[:6] == first_row and cells[10:16] == [
        "2",
        "2025-02-01 00:00:00",
        "80",
        "140",
        "lrc/iter_0000080",
        "17",
    ]


def test_a_run_at_its_last_step_is_finished(run):
    write_lines(run / "metrics.jsonl", [training_record(step) for step in (100, 200)])
    text = Page(page_of(run)).text
    assert "finished" in text and "step 200 of 200 (100.0%)" in text and "of training left" not in text


def test_the_configuration_shows_what_differs_first_and_then_everything(run):
    after = page_of(run).split("<h2>Configuration</h2>")[1]
    different, everything = after.split("All settings")
    assert "--student-hidden-size 1536" in different and "adam_beta2" not in different
    assert "adam_beta2" in everything and "0.999" in everything


@pytest.mark.parametrize("missing", ["metrics.jsonl", "validation.jsonl", "starts.jsonl", "config.yaml"])
def test_any_file_may_be_missing(run, missing):
    (run / missing).unlink()
    page = Page(page_of(run))
    gone = {"metrics.jsonl": "There is no training record yet", "config.yaml": "There is no config.yaml"}
    assert gone.get(missing, "step 140 of 200") in page.text


def test_records_with_parts_off_or_cut_short_are_drawn_as_far_as_they_go(run):
    off = {"loss": None, "lm_loss": None, "kl_loss": None, "clone_loss": None, "teacher_lm_loss": None}
    some = {**training_record(150), **off, "grad_norm": None}
    some["clone_by_layer"] = {"q": [None, 1.0, None, 2.0]}
    old = {key: training_record(160)[key] for key in ("step", "tokens", "loss", "lr")}  # of an earlier version
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(some) + "\n" + json.dumps(old) + "\n" + '{"step": 170, "tok')
    assert "step 160 of 200" in Page(page_of(run)).text
    read = read_run(run)
    assert {len(rows) for rows in read.clone_by_layer.values()} == {len(read.records)}  # one time axis for all terms


def test_a_term_that_is_on_later_than_others_keeps_its_place_in_time(run):
    records = [training_record(step) for step in (10, 20, 30)]
    del records[0]["clone_by_layer"]["gate"]
    write_lines(run / "metrics.jsonl", records)
    assert [len(row) for row in read_run(run).clone_by_layer["gate"]] == [0, 4, 4]


def test_a_configuration_of_another_version_is_shown_as_it_is(run):
    (run / "config.yaml").write_text("model:\n  a_flag_of_tomorrow: <b>3</b>\n")
    page = Page(page_of(run))
    assert "of another version or damaged" in page.text and "a_flag_of_tomorrow: <b>3</b>" in page.text


def test_warnings_of_validations_are_on_the_page(run):
    assert "Warning:" not in page_of(run)
    losses = {"lm_loss": 4.5, "teacher_kl": 1.0}
    worse = {"step": 50, "tokens": 50_000, **losses, "warning": "at step 50 the KL is <above> its first"}
    write_lines(run / "validation.jsonl", [{"step": 0, "tokens": 0, **losses}, worse])
    assert page_of(run).count("Warning: at step 50 the KL is &lt;above&gt; its first") == 1


def test_text_from_the_run_cannot_become_markup(run):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    config = Config()
    config.model.teacher, config.logging.wandb_exp_name = evil, evil
    save_yaml(config, run / "config.yaml")
    write_lines(run / "starts.jsonl", [start(0, checkpoint=evil, versions={evil: evil}, layout={evil: evil})])
    record = training_record(10)
    record["grad_norm_by_group"] = {evil: 1.0}
    write_lines(run / "metrics.jsonl", [record, {**record, "step": 20, "tokens": 20000}])
    tags = Page(page_of(run)).tags
    assert tags.count("script") == 1 and tags.count("img") == 14  # the page's own script; two images per term


def test_a_folder_without_a_run_is_refused_in_a_sentence(tmp_path, capsys):
    report = tool_main("report")
    (tmp_path / "config.yaml").write_text("a: 1\n")  # any project may have one
    assert report([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"report.py: {tmp_path} holds no run: expected is what --save named")
    assert report([str(tmp_path / "missing")]) == 2
    assert "is not a directory" in capsys.readouterr().err


def test_the_tool_writes_the_page_beside_the_run_or_where_it_is_told(run, tmp_path, capsys):
    report = tool_main("report")
    assert report([str(run)]) == 0 and (run / "report.html").read_text().startswith("<!doctype html>")
    assert report([str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert f"wrote {tmp_path / 'page.html'}" in capsys.readouterr().out
    assert report([str(run), "--output", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


def test_the_report_loads_neither_torch_nor_numpy():
    heavy = "('torch', 'numpy', 'megatron')"
    code = f"import sys, megatron_lrc.report.run_page; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_page_of_a_long_run_of_a_deep_model_is_below_two_megabytes(run):
    """Past the limits of thinning a page grows no further: 5000 records, all different, stand for any number."""
    noise = random.Random(0)
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, 5001):
            record = training_record(step)
            record["clone_by_layer"] = {term: [noise.random() for _ in range(80)] for term in CLONE_TERMS}
            record["grad_norm_by_group"] = {str(group): noise.random() for group in range(10)}
            file.write(json.dumps({**record, "lm_loss": 3 + noise.random(), "step_seconds": noise.random()}) + "\n")
    html = page_of(run)
    assert len(html) < 2_000_000 and "Curves of more than 500 records" in html


# ---- thinning ----


def test_thinning_keeps_both_ends_and_every_spike():
    points = [(float(x), math.sin(x / 500)) for x in range(20_000)]
    points[12_345] = (12_345.0, 99.0)
    points[777] = (777.0, -99.0)
    kept = thin(points)
    assert len(kept) <= 2 * MAX_BUCKETS + 2 and kept == sorted(kept)
    assert {points[0], points[-1], points[777], points[12_345]} <= set(kept)
    assert thin(points[:500]) == points[:500]


def test_columns_are_means_of_all_records():
    rows = [[float(place), 1.0, math.nan] for place in range(10 * MAX_COLUMNS)]
    columns = average_rows(rows)
    assert len(columns) == MAX_COLUMNS and [column[1] for column in columns] == [1.0] * MAX_COLUMNS
    assert columns[0][0] == 4.5 and columns[-1][0] == 10 * MAX_COLUMNS - 5.5 and math.isnan(columns[3][2])
    assert average_rows(rows[:3])[2][:2] == [2.0, 1.0]


# ---- axes and drawing ----

finite = st.floats(-1e12, 1e12, allow_subnormal=False)


@given(st.lists(finite, min_size=1, max_size=9), st.booleans(), st.booleans())
def test_an_axis_has_room_for_all_values_and_a_few_ascending_ticks(values, is_log, from_zero):
    axis = Axis.around(values, is_log=is_log, from_zero=from_zero)
    for value in values:
        place = axis.place(value)
        assert place is None if axis.is_log and value <= 0 else is_log or (place is not None and 0 <= place <= 1)
    ticks = axis.ticks()
    assert ticks == sorted(set(ticks)) and len(ticks) <= 16
    assert all(axis.low <= tick <= axis.high for tick in ticks)


def test_ticks_are_round_numbers():
    assert Axis(0.0, 10.0).ticks() == [0, 2, 4, 6, 8, 10]
    assert Axis(0.9, 1100.0, True).ticks() == [1, 10, 100, 1000]
    assert [tick_text(tick) for tick in (0.0, 0.25, 1500.0, 2e7, 5e-5, -2000.0)] == [
        "0",
        "0.25",
        "1.5K",
        "20M",
        "5e-5",
        "-2K",
    ]
    assert [number(value) for value in (3.58123, 1234.5, 1.2e-5, None, math.nan)] == [
        "3.581",
        "1,234",
        "1.20e-05",
        "-",
        "-",
    ]


def test_a_curve_goes_through_its_points():
    chart = charts.Chart("t", "", [charts.Series("s", [(0.0, 0.0), (5.0, math.nan), (10.0, 1.0)], 0)], from_zero=True)
    (path,) = re.findall(r'<path class="curve s0" d="M(.*?)"', charts.draw(chart))
    (x0, y0), (x1, y1) = (map(float, point.split()) for point in path.split("L"))
    assert (x0, x1) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert y0 == charts.HEIGHT - charts.BOTTOM and y1 == pytest.approx(
        charts.TOP + 0.06 / 1.06 * charts.INNER_HEIGHT, abs=0.06
    )


def test_stacked_parts_lie_on_one_another():
    series = [charts.Series(str(place), [(0.0, 1.0), (1.0, 1.0)], place) for place in range(2)]
    html = charts.draw(charts.Chart("t", "", series, is_stacked=True))
    (low, high) = re.findall(r'<path class="area f\d" d="M(.*?)Z"', html)
    tops = [float(outline.split("L")[0].split()[1]) for outline in (low, high)]
    assert charts.HEIGHT - charts.BOTTOM - tops[0] == pytest.approx(tops[0] - tops[1], abs=0.2)


def test_a_chart_without_a_finite_value_is_left_out():
    assert charts.draw(charts.Chart("t", "", [charts.Series("s", [(0.0, math.nan)], 0)])) == ""
    assert charts.draw_heat_map("q", [[math.nan, 0.0]], (0.0, 1.0)) == ""


def test_the_image_has_the_palette_s_colours_and_is_transparent_where_a_term_is_off():
    image = pytest.importorskip("matplotlib.image")
    pixels = image.imread(BytesIO(png.encode([bytes([0, png.LEVELS - 1]), bytes([png.NOTHING, 100])])), format="png")
    colors = png.palette()
    assert pixels.shape == (2, 2, 4)
    assert [round(255 * value) for value in pixels[0, 0]] == [*colors[0], 255] == [*png.ANCHORS[0], 255]
    assert [round(255 * value) for value in pixels[0, 1]] == [*png.ANCHORS[-1], 255]
    assert pixels[1, 0][3] == 0 and [round(255 * value) for value in pixels[1, 1]] == [*colors[100], 255]
