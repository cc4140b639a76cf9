"""The learning rate: warmup and decay in steps, what refuses them, the rule of --lr auto, warnings of losses."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from config_cases import change, errors_of
from megatron_lrc.config import (
    PUBLISHED_RUNS,
    Config,
    describe_changes,
    describe_rate,
    describe_schedule,
    load_yaml,
    parse_config,
    recommended_lr,
    save_yaml,
    validate,
)
from megatron_lrc.config.rates import KNOWN_RATES
from megatron_lrc.launch.auto_rate import with_number
from megatron_lrc.mcore.optimizer import _lr_schedule
from megatron_lrc.methods import method_of
from megatron_lrc.train.rises import Rises
from megatron_lrc.train.start_checks import check

OLD = Path(__file__).parents[1] / "fixtures/old_checkpoints"


def rates(*flags: str, steps: int, start: int = 0) -> list[float]:
    """The rate of every step from `start` on, of a run of so many steps, as megatron-core's scheduler sets it."""
    config = parse_config(["--train-iters", str(steps), *flags]).resolved(1)
    optimizer: Any = SimpleNamespace(param_groups=[{}])
    schedule = _lr_schedule(config, optimizer)
    schedule.num_steps = start
    schedule.step(0)
    found = []
    for _ in range(start, steps):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step(1)
    return found


# ---- warmup ----


@pytest.mark.parametrize(
    ("steps", "flags", "warmup"),
    [
        (4, "", 0),
        (5, "", 1),
        (20, "", 4),
        (49, "", 9),
        (50, "", 10),
        (1000, "", 10),
        (2100, "", 11),  # 0.005 of them, from here on
        (20, "--lr-warmup-fraction 0.005", 0),
        (1000, "--lr-warmup-fraction 0.07", 70),
        (20, "--lr-warmup-iters 0", 0),
        (20, "--lr-decay-iters 100", 10),
    ],
)
def test_a_short_run_warms_up_too_unless_flags_say_otherwise(steps, flags, warmup):
    assert parse_config(["--train-iters", str(steps), *flags.split()]).warmup_iters == warmup


def test_presets_of_the_released_code_have_its_warmup():
    for preset in ("reference", *PUBLISHED_RUNS):
        of_preset = parse_config(["--preset", preset, "--train-iters", "60"])
        assert of_preset.warmup_iters == 0, "rounded, however short the run is"
        assert parse_config(["--preset", preset, "--train-iters", "60", "--lr-warmup-iters", "7"]).warmup_iters == 7
    for preset in PUBLISHED_RUNS:
        config = parse_config(["--preset", preset]).resolved(8)
        assert config.warmup_iters == int(0.005 * config.train_iters + 0.5) > 1000


def test_a_run_of_an_older_version_goes_on_with_its_warmup(tmp_path):
    config = load_yaml(OLD / "lrc/config.yaml")
    change(config, teacher=str(OLD / "teacher"), data_path=[str(OLD / "data/counting")], train_iters=20)
    change(config, tensor_model_parallel_size=1, pipeline_model_parallel_size=1, sequence_parallel=False)
    change(config, data_cache_path=str(tmp_path), save=None, global_batch_size=4, bf16=False)
    new = check(config.resolved(1), 1)
    change(config, load=str(OLD / "lrc"))
    old = check(config.resolved(1), 1)
    assert (new.config.warmup_iters, old.config.warmup_iters) == (4, 0)
    assert new.state.has_least_warmup and not old.state.has_least_warmup  # which its next checkpoints say
    change(config, lr_warmup_iters=3)
    assert check(config.resolved(1), 1).config.warmup_iters == 3


# ---- WSD ----

WSD = ("--lr", "1.0", "--lr-decay-style", "WSD", "--lr-warmup-iters", "2")


def test_wsd_holds_the_rate_and_lowers_it_at_the_end():
    found = rates(*WSD, "--lr-wsd-decay-iters", "4", "--lr-wsd-decay-style", "linear", steps=12)
    assert found == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    with_fraction = ("--lr-wsd-decay-fraction", "0.3334", "--lr-wsd-decay-style", "linear")
    assert rates(*WSD, *with_fraction, steps=12) == pytest.approx(found)
    assert rates(*WSD, "--lr-wsd-decay-iters", "4", steps=12)[-1] == pytest.approx(2 * 0.5**0.75 - 1)  # exponential
    assert parse_config([*WSD, "--train-iters", "100"]).wsd_decay_iters == 20
    assert rates(*WSD, "--lr-wsd-decay-iters", "0", steps=12)[2:] == [1.0] * 10


def test_a_larger_budget_moves_the_decay_to_its_end():
    flags = (*WSD, "--lr-wsd-decay-iters", "4")
    short, long = rates(*flags, steps=12), rates(*flags, steps=30, start=8)
    assert rates(*flags, steps=30)[:9] == short[:9], "up to the decay both are one run"
    assert long[:19] == [1.0] * 19 and long[-4:] == short[-4:]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr-wsd-decay-iters 5", "--lr-wsd-decay-iters 5 means nothing with --lr-decay-style linear. Use"),
        ("--lr-wsd-decay-style cosine --lr-decay-style constant", "--lr-wsd-decay-style cosine means nothing with"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 5 --lr-wsd-decay-fraction 0.1", "are both given. Keep one."),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 101", "A decay of 101 steps"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 91", "after 10 of warmup is longer than the 100 steps"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 41 --lr-decay-iters 50", "Use at most 40."),
        ("--lr auto --method logits", "--lr auto has no rule for --method logits"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_in_a_sentence(valid_config, tmp_path, flags, words):
    save_yaml(valid_config, tmp_path / "valid.yaml")
    config = parse_config(["--config", str(tmp_path / "valid.yaml"), *flags.split()])
    (error,) = errors_of(validate, method_of(config))
    assert words in error


def test_a_run_that_goes_on_inside_its_decay_is_warned(tmp_path):
    """The checkpoint of the fixture is of step 3."""
    run = tmp_path / "run"
    shutil.copytree(OLD / "lrc", run)
    state = run / "iter_0000003/run.json"
    record = json.loads(state.read_text())
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2, "lr_decay_iters": None}
    record["config"]["optimizer"] |= wsd
    record["config"]["training"]["train_iters"] = 4
    del record["crc32"]
    state.write_text(json.dumps(record))
    config = Config.from_dict(record["config"])
    change(config, teacher=str(OLD / "teacher"), data_path=[str(OLD / "data/counting")], load=str(run), save=None)
    change(config, tensor_model_parallel_size=1, pipeline_model_parallel_size=1, sequence_parallel=False)
    change(config, data_cache_path=str(tmp_path), bf16=False)
    warnings = {}
    for steps in (4, 40):
        change(config, train_iters=steps)
        warnings[steps] = [text for text in check(config.resolved(1), 1).warnings if "learning rate" in text]
    assert warnings[4] == [], "a restart of the same run"
    (warning,) = warnings[40]
    assert warning.startswith("step 3 is in the decay of the run so far, which began after step 2; with the budget")
    assert "begins after step 38, so the learning rate goes up again" in warning


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("", "learning rate: 0.0001 after 10 steps of warmup, then linear decay to 0 at step 1,000"),
        ("--lr-decay-style constant --lr-warmup-iters 0", "learning rate: 0.0001, constant"),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 0 --lr-warmup-iters 0",
            "learning rate: 0.0001, held to step 1,000",
        ),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 300 --min-lr 1e-6",
            "learning rate: 0.0001 after 10 steps of warmup, held to step 700, then exponential decay to 1e-06 at step "
            "1,000",
        ),
    ],
)
def test_the_schedule_is_said_in_a_line(flags, line):
    config = parse_config(["--train-iters", "1000", *flags.split()])
    assert describe_schedule(config.optimizer, config.decay_iters) == line


# ---- --lr auto ----


def test_the_rule_goes_through_its_table_and_nowhere_leaps():
    for start, rows in KNOWN_RATES.items():
        batches = [row.batch_tokens for row in rows]
        assert batches == sorted(set(batches))
        for row in rows:
            assert recommended_lr(start, row.batch_tokens) == row.lr
            assert str(row) in describe_rate(start, row.batch_tokens)
        first, last = rows[0], rows[-1]
        assert recommended_lr(start, first.batch_tokens // 4) == pytest.approx(first.lr / 2, rel=0.06)  # two digits
        assert recommended_lr(start, last.batch_tokens * 100) == last.lr
        for batch in (2**k for k in range(5, 24)):
            assert 0.6 < recommended_lr(start, 2 * batch) / recommended_lr(start, batch) < 1.6


def test_auto_becomes_a_number_with_its_reason():
    flags = ["--lr", "auto", "--init", "ridge", "--global-batch-size", "4", "--seq-length", "256", "--train-iters", "9"]
    config = parse_config([*flags, "--open-after", "0.5"])
    assert config.optimizer.lr is None and "--lr auto" in describe_changes(config)
    resolved = config.resolved(1)
    closed, opened = recommended_lr("closed form", 1024), recommended_lr("opened", 1024)
    assert (resolved.optimizer.lr, resolved.projection.open_lr) == (closed, opened)
    numbered, line = with_number(config, 1)
    assert numbered.resolved(1) == resolved and line is not None
    assert line.startswith(f"--lr auto: {closed:g} for a closed-form start and steps of 1,024 tokens: ")
    assert f"then {opened:g} for an opened student" in line
    # The batch of a run without --global-batch-size follows from the number of its processes.
    assert parse_config(["--lr", "auto", "--train-iters", "9"]).resolved(8).optimizer.lr == recommended_lr(
        "random", 8 * 2048
    )


def test_a_number_wins_over_the_recommended_rule(tmp_path):
    recommended = parse_config(["--preset", "recommended"])
    assert recommended.optimizer.lr is None
    assert parse_config(["--preset", "recommended", "--lr", "3e-5"]).resolved(1).optimizer.lr == 3e-5
    assert with_number(parse_config(["--lr", "3e-5"]), 1)[1] is None
    resolved = parse_config(["--preset", "recommended", "--train-iters", "9"]).resolved(1)
    save_yaml(resolved, tmp_path / "config.yaml")
    assert load_yaml(tmp_path / "config.yaml") == resolved and isinstance(resolved.optimizer.lr, float)


def test_a_continued_run_keeps_its_rate_whatever_its_batch_is():
    flags = ["--lr", "auto", "--load", str(OLD / "lrc"), "--global-batch-size", "999", "--train-iters", "9"]
    numbered, line = with_number(parse_config(flags), 1)
    assert (numbered.optimizer.lr, line) == (0.01, "--lr auto: 0.01, as before")


# ---- warnings of validations ----


def said(records: list[dict[str, float]], before: int = 0) -> list[int]:
    """Places of the records that something is said of."""
    numbered = [{"step": place, **record} for place, record in enumerate(records)]
    rises = Rises(parse_config(["--train-iters", "30"]), numbered[:before])
    return [record["step"] for record in numbered[before:] if rises.look_at(record)]


def test_a_validation_above_the_first_is_said_once_and_again_after_it_was_below():
    values = [1.0, 0.9, 1.2, 1.3, 1.0005, 1.1, 0.99, 1.2, 1.0001]
    by_key = {key: [{"lm_loss": 4.0, **{key: value}} for value in values] for key in ("teacher_kl", "lm_loss")}
    assert said(by_key["teacher_kl"]) == said(by_key["lm_loss"]) == [2, 7]
    assert said(by_key["teacher_kl"], before=4) == [7], "a continued run knows what was before"
    with_teacher = [{"lm_loss": value, "teacher_kl": 1.0} for value in values]
    assert said(with_teacher) == [], "where there is a teacher its KL decides"
    assert said([{"lm_loss": float("nan")}, {"lm_loss": 2.0}, {"lm_loss": 2.1}]) == [2]


def test_the_warning_has_both_values_and_says_what_to_do():
    rises = Rises(parse_config(["--lr", "1e-4", "--train-iters", "30"]))
    assert rises.look_at({"step": 0, "lm_loss": 4.6, "teacher_kl": 1.0918, "clone_loss": 9.0}) is None
    assert rises.look_at({"step": 5, "lm_loss": 12.0, "teacher_kl": 7.25, "clone_loss": 8.0}) == (
        "at step 5 the KL from the teacher on the validation data is 7.25, above the 1.092 of the first validation: "
        "the training makes this student worse. Lower --lr (now 0.0001), or use a longer --lr-warmup-iters (now 6), or "
        "lower --alpha (now 0.2)."
    )


def test_a_clone_loss_that_rises_while_the_student_gets_better_is_said():
    records = [{"lm_loss": 4.5, "teacher_kl": 1.1, "clone_loss": 569.0}]
    records += [{"lm_loss": 4.2, "teacher_kl": 0.9, "clone_loss": value} for value in (800.0, 1200.0, 1300.0)]
    assert said(records) == [2]
    assert said([{**record, "lm_loss": 4.5 + place} for place, record in enumerate(records)]) == []
