"""A run's budget: one, in tokens, sequences, steps or epochs, and the steps follow from it whatever the batch is."""

import pytest

from config_cases import change, data_config, errors_of
from megatron_lrc.config import (
    PRESETS,
    SETTINGS,
    Config,
    convert,
    describe_changes,
    describe_departures,
    describe_training,
    load_yaml,
    parse_config,
    save_yaml,
    short_count,
    validate,
)
from megatron_lrc.data.datasets import resolve_train_iters
from megatron_lrc.methods import method_of

NAMES = ("train_tokens", "train_samples", "train_iters", "train_epochs")


def budget(config: Config) -> dict[str, int]:
    return {name: value for name in NAMES if (value := getattr(config.training, name))}


@pytest.fixture
def write(tmp_path):
    def write_yaml(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write_yaml


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10B", 10**10),
        ("500M", 500 * 10**6),
        ("1.5e9", 1_500_000_000),
        ("2T", 2 * 10**12),
        ("0.3b", 300_000_000),
        (1.5e9, 1_500_000_000),
        (7, 7),
        *((text, None) for text in ("", "B", "10G", "1.5", "ten", "nan", "infB", "1e99", "1e999999999", True, 0.5)),
        *((value, None) for value in (float("inf"), [1], "10 tokens")),
    ],
)
def test_counts_are_read_exactly_or_refused(text, number):
    for name in ("train_tokens", "train_samples"):
        if number is None:
            with pytest.raises(ValueError, match="is not a whole number such as 1000000, 500M, 10B or 1.5e9"):
                convert(SETTINGS[name], text)
        else:
            assert convert(SETTINGS[name], text) == number


def test_counts_are_shown_as_they_may_be_given(write):
    for text in ("10B", "1500M", "49152", "3T", "12K"):
        config = parse_config(["--train-tokens", text])
        assert describe_changes(config) == [f"--train-tokens {text}"]
        assert parse_config(["--config", write(f"train-tokens: {text}")]) == config
    assert list(map(short_count, (49_152_000, 18_000_379_904, 999_999_999, 12))) == ["49.2M", "18B", "1B", "12"]


def test_a_flag_replaces_the_files_budget_and_the_file_the_presets(write):
    preset = ["--preset", "lrc-4b"]
    assert budget(parse_config(preset)) == {"train_tokens": 18 * 10**9}
    assert budget(parse_config(["--preset", "lrc-4b", "lrc-1.5b"])) == {"train_tokens": 10**10}
    file = ["--config", write("train-samples: 3M\n")]
    assert budget(parse_config([*preset, *file])) == {"train_samples": 3_000_000}
    for flag, value in (("train_iters", 100), ("train_epochs", 2), ("train_tokens", 5)):
        given = ["--" + flag.replace("_", "-"), str(value)]
        assert budget(parse_config([*preset, *file, *given])) == {flag: value}
    untrained = parse_config([*preset, "--train-iters", "0"]).training
    assert (untrained.train_iters, untrained.train_tokens) == (0, None)


def test_two_budgets_in_one_place_are_refused(write):
    message = "--train-tokens 10B and --train-iters 5 are given together. A run has one budget: keep one."
    flags = ["--train-iters", "5", "--train-tokens", "10B"]
    assert errors_of(parse_config, flags) == [message]
    file = write("train_iters: 5\ntraining:\n  train_tokens: 10B\n")
    assert errors_of(parse_config, ["--config", file]) == [f"--config {file}: {message}"]
    assert errors_of(load_yaml, file) == [f"{file}: {message}"]
    (error,) = errors_of(parse_config, ["--train-iters", "0", "--train-tokens", "10B"])
    assert error.startswith("--train-tokens 10B and --train-iters 0 are given together")


def test_a_run_without_a_budget_is_refused_and_nothing_is_trained_only_when_asked(valid_config):
    change(valid_config, train_iters=None)
    (error,) = errors_of(validate, method_of(valid_config))
    assert error.startswith("How long to train is not given. Give --train-tokens (such as 10B), ")
    change(valid_config, train_tokens=10, train_iters=5)
    (error,) = errors_of(validate, method_of(valid_config))
    assert error.startswith("--train-tokens 10 and --train-iters 5 are given together")
    change(valid_config, train_tokens=0, train_iters=None)
    assert "--train-tokens is 0; it must be at least 1." in errors_of(validate, method_of(valid_config))
    change(valid_config, train_tokens=None, train_iters=0, save="run", data_path=[])
    validate(method_of(valid_config))
    change(valid_config, train_tokens=10**9, train_iters=None)
    assert errors_of(validate, method_of(valid_config)) == [
        "--train-tokens 1B needs training data. Give --data-path or --train-data-path."
    ]


def test_steps_are_the_fewest_that_reach_the_budget():
    def steps(**values: object) -> int:
        config = Config()
        change(config, global_batch_size=8, seq_length=16, **values)
        return config.resolved(1).train_iters

    assert [steps(train_tokens=tokens) for tokens in (1, 128, 129, 1280)] == [1, 1, 2, 10]
    assert [steps(train_samples=samples) for samples in (1, 8, 9, 80)] == [1, 1, 2, 10]
    assert steps(train_iters=7) == 7 and steps(train_iters=0) == 0


def test_a_presets_tokens_are_its_published_ones_whatever_the_batch():
    for preset, steps in (("lrc-1.5b", 203_451), ("lrc-1.7b", 610_352), ("lrc-4b", 549_317), ("lrc-2.7b", 203_451)):
        assert parse_config(["--preset", preset]).resolved(8).train_iters == steps
        assert "train_iters" not in PRESETS[preset]
    larger = parse_config(["--preset", "lrc-4b", "--global-batch-size", "256"]).resolved(64)
    assert (larger.train_iters, larger.warmup_iters, larger.decay_iters) == (34_333, 172, 34_333)
    assert describe_training(larger.training) == "18B tokens in 34,333 steps of 524,288 tokens"


@pytest.mark.parametrize("name", ["train_tokens", "train_samples"])
def test_a_resumed_run_ends_at_its_budget_with_another_batch(name):
    size = {"train_tokens": 16, "train_samples": 1}[name]
    config = data_config(train_iters=None, **{name: 100 * size})
    place = {"step": 3, "consumed_samples": 24, "consumed_tokens": 24 * 16}
    assert resolve_train_iters(config).train_iters == resolve_train_iters(config, **place).train_iters == 13
    config.training.global_batch_size = 16
    doubled = resolve_train_iters(config, **place)
    assert doubled.train_iters == 3 + 5  # 76 sequences are left
    assert describe_training(doubled.training, step=3, consumed_tokens=384) == "1.66K tokens in 8 steps of 256 tokens"
    done = {"step": 13, "consumed_samples": 104, "consumed_tokens": 104 * 16}
    assert resolve_train_iters(config, **done).train_iters == 13  # nothing is left, whatever the batch


def test_a_saved_file_has_one_budget_and_older_ones_read_as_before(tmp_path, write):
    config = parse_config(["--train-tokens", "10B", "--global-batch-size", "24"]).resolved(8)
    save_yaml(config, tmp_path / "saved.yaml")
    saved = load_yaml(tmp_path / "saved.yaml")
    assert budget(saved) == {"train_tokens": 10**10} and saved.training.train_iters is None
    assert saved.resolved(8) == config
    assert Config.from_dict(config.to_dict()).resolved(8) == config
    for text, expected in (
        ("train_iters: 3\ntrain_epochs: 0", {"train_iters": 3}),
        ("train_iters: 0\ntrain_epochs: 2", {"train_epochs": 2}),
        ("train_iters: 0\ntrain_epochs: 0", {}),
    ):
        assert budget(load_yaml(write(text))) == expected
    assert load_yaml(write("train_iters: 0\ntrain_epochs: 0")).training.train_iters == 0


def test_steps_are_not_known_before_the_budget_is_counted():
    with pytest.raises(AssertionError, match="counted in steps"):
        _ = parse_config(["--train-tokens", "10B"]).train_iters


def test_flags_that_change_a_presets_budget_or_batch_are_named():
    def departures(*flags: str, preset: str = "lrc-1.5b") -> list[str]:
        return list(describe_departures(parse_config(["--preset", preset, *flags]).resolved(8), [preset]))

    assert departures() == departures("--train-tokens", "10B") == departures("--train-iters", "203451") == []
    assert departures("--train-iters", "100", preset="reference") == []
    for budget, words in (
        (("--train-iters", "1000"), "--train-iters 1000 is 49.2M tokens"),
        (("--train-samples", "1M"), "--train-samples 1M is 2.05B tokens"),
        (("--train-tokens", "2B"), "--train-tokens 2B"),
    ):
        assert departures(*budget) == [f"{words}; --preset lrc-1.5b trains 10B"]
    (batch,) = departures("--global-batch-size", "48")
    assert batch == (
        "--global-batch-size 48 where lrc-1.5b has 24: 101,726 steps instead of 203,451; the --lr 0.0001 of lrc-1.5b "
        "was published for a batch of 24"
    )
    (own_rate,) = departures("--global-batch-size", "48", "--lr", "2e-4")
    assert own_rate == batch.partition(";")[0]
