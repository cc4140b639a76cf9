"""Flags and YAML keys come from the dataclasses, a flag beats the file, and every mistake is named in one line."""

import shlex
from dataclasses import fields

import pytest

from megatron_lrc.config import (
    PRESETS,
    PUBLISHED_RUNS,
    SETTINGS,
    TRAINING,
    Config,
    ConfigError,
    build_parser,
    convert,
    describe_changes,
    flag_of,
    load_yaml,
    parse_config,
    save_yaml,
)


def errors_of(*argv):
    with pytest.raises(ConfigError) as caught:
        parse_config(argv)
    return str(caught.value).splitlines()


@pytest.fixture
def write(tmp_path):
    def write_yaml(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write_yaml


def test_no_flags_give_the_defaults():
    assert parse_config([]) == Config()


def test_field_names_are_unique_across_sections():
    names = [field.name for section in fields(Config) for field in fields(section.default_factory)]
    assert len(names) == len(set(names)) == len(SETTINGS)


def test_flags_are_converted_to_their_field_types():
    config = parse_config(
        shlex.split(
            "--student-hidden-size 384 --lr 3e-4 --init pca --bf16 --no-eod-mask-loss --data-path 0.5 a 0.5 b "
            "--save run --min-lr=1e-5"
        )
    )
    assert config.model.student_hidden_size == 384
    assert (config.optimizer.lr, config.optimizer.min_lr) == (3e-4, 1e-5)
    assert config.projection.init == "pca"
    assert config.training.bf16 is True and config.data.eod_mask_loss is False
    assert config.data.data_path == ["0.5", "a", "0.5", "b"]


def test_a_tristate_flag_keeps_unset_apart_from_no():
    name = "untie_embeddings_and_output_weights"
    values = [getattr(parse_config(argv).model, name) for argv in ([], [flag_of(name)], [flag_of(f"no_{name}")])]
    assert values == [None, True, False]


def test_default_then_file_then_flag(write):
    file = write("lr: 2e-4\noptimizer:\n  min-lr: 1e-6\ntraining:\n  seq_length: 512\n  bf16: true\n")
    config = parse_config(["--seq-length", "128", "--config", file, "--no-bf16"])
    assert config.optimizer.lr == 2e-4  # PyYAML alone reads 2e-4 as text
    assert config.optimizer.min_lr == 1e-6
    assert config.training.seq_length == 128 and config.training.bf16 is False
    assert config.training.micro_batch_size == 1


def test_default_then_preset_then_file_then_flag(write):
    released = parse_config(["--preset", "reference"])
    assert (released.loss.kl_reduction, released.loss.clone_attention_output) == ("sequence-sum", "teacher")
    file = write("preset: reference\nkl-reduction: mean\ninit-method-std: 0.1\n")
    mixed = parse_config(["--config", file, "--init-method-std", "0.3"])
    assert (mixed.loss.kl_reduction, mixed.loss.clone_attention_output) == ("mean", "teacher")
    assert mixed.projection.init_method_std == 0.3
    overruled = parse_config(["--config", file, "--preset", "paper"])
    assert (overruled.loss.clone_attention_output, overruled.projection.init_method_std) == ("student", 0.1)


def test_the_paper_preset_is_the_default_and_presets_name_settings():
    assert parse_config(["--preset", "paper"]) == Config()
    for values in PRESETS.values():
        for name, value in values.items():
            assert convert(SETTINGS[name], value) == value


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--preset", "release"], f"--preset release is unknown; expected are any of {', '.join(PRESETS)}"),
        (["--student-hiden-size", "3"], "unknown flag --student-hiden-size; did you mean --student-hidden-size?"),
        (["--seq_length=3"], "unknown flag --seq_length; did you mean --seq-length?"),
        (["--zzz"], "unknown flag --zzz"),
        (["--seq-len", "3"], "unknown flag --seq-len; did you mean --seq-length?"),  # no abbreviations
        (["word"], "word belongs to no flag"),
        (["--lr", "fast"], "--lr: 'fast' is not a number, or auto"),
        (["--seq-length", "1.5"], "--seq-length: '1.5' is not a whole number"),
        (["--init", "svd"], "--init: 'svd' is not one of random, orthogonal, channel, pca, ridge, released"),
        (["--lr"], "--lr: expected one argument"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml cannot be read: No such file or directory"),
    ],
)
def test_a_mistaken_flag_is_named(argv, expected):
    assert errors_of(*argv) == [expected]


def test_a_negative_number_is_a_value_not_a_flag():
    assert parse_config(["--lr", "-1e-4"]).optimizer.lr == -1e-4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sequence-lenght: 3", "config.yaml line 1: unknown key sequence-lenght; did you mean seq_length?"),
        ("optimizer:\n  lrr: 3", "config.yaml line 2: unknown key lrr; did you mean lr?"),
        ("optimiser:\n  lr: 3", "config.yaml line 1: unknown key optimiser; did you mean optimizer?"),
        ("model:\n  lr: 3", "config.yaml line 2: lr belongs to section optimizer, not model"),
        ("model: 3", "config.yaml line 1: section model has no `key: value` lines under it"),
        ("lr: fast", "config.yaml line 1: lr: 'fast' is not a number, or auto"),
        ("lr: true", "config.yaml line 1: lr: True is not a number"),
        ("seq_length: 1.5", "config.yaml line 1: seq_length: 1.5 is not a whole number"),
        ("seq_length: null", "config.yaml line 1: seq_length: None is not a whole number"),
        ("bf16: 1", "config.yaml line 1: bf16: 1 is not true or false"),
        ("teacher: 3", "config.yaml line 1: teacher: 3 is not text"),
        (
            "init: [pca]",
            "config.yaml line 1: init: ['pca'] is not one of random, orthogonal, channel, pca, ridge, released",
        ),
        ("data-path: {a: 1}", "config.yaml line 1: data-path: {'a': 1} is not a list of texts"),
        ("lr: 1\noptimizer:\n  lr: 2", "config.yaml line 3: lr is set twice"),
        ("lr: 1\nlr: 2", "config.yaml line 2: lr is set twice"),
        ("- lr", "is not a mapping; write lines like `student-hidden-size: 1536`"),
        ("lr: [", "config.yaml is not valid YAML: "),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(write, text, expected):
    (error,) = errors_of("--config", write(text))
    assert expected in error


def test_mistakes_of_flags_and_file_are_reported_together(write):
    errors = errors_of("--config", write("lrr: 1\nseq_length: long"), "--zzz", "--lr", "fast")
    assert len(errors) == 4


def test_the_file_takes_lists_and_null(write):
    config = load_yaml(write("data-path: [0.3, a, 0.7, b]\nvalid-data-path: one\nsave: null\n"))
    assert config.data.data_path == ["0.3", "a", "0.7", "b"]
    assert config.data.valid_data_path == ["one"]
    assert config.checkpoint.save is None


def test_an_empty_file_gives_the_defaults(write):
    assert load_yaml(write("# nothing\n")) == Config()


def test_what_is_saved_reads_back_the_same(tmp_path):
    flags = "--teacher t --lr 6.7e-5 --adam-eps 1e-8 --data-path 1 a --no-bf16 --init pca"
    config = parse_config(shlex.split(flags))
    save_yaml(config, tmp_path / "config.yaml")
    assert load_yaml(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_the_console_shows_only_changes_and_they_are_flags():
    argv = shlex.split("--teacher t --no-untie-embeddings-and-output-weights --lr 0.001 --bf16 --data-path 1 a")
    lines = describe_changes(parse_config(argv))
    assert sorted(" ".join(lines).split()) == sorted(argv)
    assert parse_config(" ".join(lines).split()) == parse_config(argv)
    assert describe_changes(Config()) == []


def test_help_explains_every_flag_with_its_default():
    text = "".join(build_parser(*TRAINING).format_help().split())  # lines are broken at hyphens too
    for name, setting in SETTINGS.items():
        assert flag_of(name) in text
        after = text.partition("".join(setting.help.split()))[2]
        shown = setting.is_required or setting.default in (None, []) or "Default:" in after
        assert shown, name
    for section in fields(Config):
        assert f"{section.name}:" in text


def test_help_and_version_exit_with_zero(capsys):
    for flag in ("--help", "--version"):
        with pytest.raises(SystemExit) as exit:
            parse_config([flag])
        assert exit.value.code == 0
    assert "megatron_lrc 0." in capsys.readouterr().out


@pytest.mark.parametrize("name", PUBLISHED_RUNS)
def test_a_published_run_says_everything_but_where_teacher_and_data_are(name):
    config = parse_config(["--preset", name]).resolved(8)
    tokens = config.train_iters * config.global_batch_size(8) * config.training.seq_length
    assert round(tokens / 1e9) == int(PUBLISHED_RUNS[name][1].removesuffix("B"))
    assert config.global_batch_size(8) % 8 == 0  # eight data-parallel replicas, as published
    assert config.model.student_hidden_size and config.loss.kl_temperature == 40
    assert config.total_kl_weight == pytest.approx(1.28)  # the released code's, as this package weighs the KL


@pytest.mark.parametrize("name", PUBLISHED_RUNS)
def test_a_published_run_is_that_of_the_released_code(name):
    published = parse_config(["--preset", name])
    assert parse_config(["--preset", name, "reference"]) == published
    assert (published.loss.clone_attention_output, published.loss.kl_reduction) == ("teacher", "sequence-sum")
    assert (published.model.student_norm_epsilon, published.projection.init_method_std) == (1e-5, 0.02)
    paper = parse_config(["--preset", name, "paper"]).loss
    assert (paper.clone_attention_output, paper.kl_reduction) == ("student", "mean")


def test_presets_combine_and_a_later_one_wins(write):
    config = parse_config(["--preset", "lrc-4b", "reference"])
    assert (config.model.student_hidden_size, config.loss.clone_attention_output) == (2048, "teacher")
    assert parse_config(["--preset", "lrc-4b", "paper"]).loss.kl_reduction == "mean"
    assert parse_config(["--preset", "paper", "lrc-4b"]).loss.kl_reduction == "sequence-sum"
    for text in ("preset: [lrc-4b, reference]", "preset: lrc-4b reference"):
        assert parse_config(["--config", write(text)]) == config
    assert parse_config(["--preset", "lrc-4b", "--alpha", "0.1", "--no-bf16"]).loss.alpha == 0.1


def test_a_file_of_another_kind_is_not_listed_line_by_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"key{number}: 1\n" for number in range(10_000)))
    with pytest.raises(ConfigError) as caught:
        parse_config(["--config", str(path)])
    lines = str(caught.value).splitlines()
    assert len(lines) == 51 and lines[0].startswith(f"{path} line 1: unknown key key0")
    assert lines[-1] == f"{path} line 51: from here on nothing was looked at, since 50 lines are wrong"


def test_the_temperature_over_the_top_k_is_1_unless_one_is_given(tmp_path):
    def temperature(*flags):
        return parse_config(list(flags)).loss.kl_temperature

    assert temperature() == 40 and temperature("--kl-top-k", "64") == 1
    assert temperature("--kl-top-k", "64", "--kl-temperature", "2") == 2
    assert temperature("--kl-top-k", "64", "--preset", "lrc-1.5b") == 40
    (tmp_path / "config.yaml").write_text("kl_temperature: 3")
    assert temperature("--kl-top-k", "64", "--config", str(tmp_path / "config.yaml")) == 3
