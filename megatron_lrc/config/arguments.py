"""Flags and YAML keys made from the fields of `settings`. Precedence: default < --preset < --config FILE < flag.

Both sources give one dict, field name -> value, through the same `convert()`, so that a wrong type reads the same
wherever it stands. YAML keys are field names with `-` or `_`, at the top level or under their section's name; what
`save_yaml()` writes can be read back with `--config`. All errors of the command line and the file are reported at once,
one per line of a `ConfigError`. argparse only splits the command line and prints --help: it stores plain strings here,
because its own type errors stop at the first and print the whole usage. Ranges and combinations are validation.py's.
"""

import argparse
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

import yaml

from megatron_lrc import __version__

from .budget import BUDGETS, budgets_in, is_counted, refuse_several
from .config import Config, ConfigError, flag_of
from .counts import exact_count
from .presets import PRESETS, PUBLISHED_RUNS
from .schedule import ALTERNATIVES
from .schema import SECTIONS, SETTINGS, Setting, convert, parse_number, suggest
from .yaml_limits import check_yaml

NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|-(inf|nan)")


# ---------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises a ConfigError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


#: A program with the settings as its flags: its usage, and what it is for.
TRAINING = (
    "python -m megatron_lrc train [--config FILE] --teacher DIR --student-hidden-size N --train-tokens N [FLAGS]",
    "Pretrain a Low-Rank Clone of a teacher model; with --method ordinary train a model by itself. With "
    "--dry-run [GPUS] nothing is started: everything is checked, and parameters, FLOPs, memory per GPU, disk space and "
    "days are estimated (--gpu NAME: of that kind, --mfu X: at that share of its peak).",
)


def build_parser(usage: str, purpose: str) -> Parser:
    """One flag per setting, grouped by section. No defaults: a flag not given must not hide the file's value."""
    parser = Parser(
        usage=usage,
        description=f"{purpose} Sizes are counts (tokens, features, layers, sequences, steps). "
        "Precedence: default < --preset < --config FILE < flag.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"megatron_lrc {__version__}")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file: field names, optionally under their section's name."
    )
    parser.add_argument(
        "--preset",
        nargs="+",
        metavar="NAME",
        help="One or several, a later one over an earlier one. recommended: what we would start with "
        f"({describe_preset('recommended')}); paper: the losses as published, which is the default; "
        f"reference: as in the released code ({describe_preset('reference')}); the published runs, each everything of "
        "reference and its sizes, rate, alpha and tokens: "
        + "; ".join(f"{name}: {' for '.join(run)} tokens" for name, run in PUBLISHED_RUNS.items())
        + f" ({describe_preset('lrc-1.5b', without=PRESETS['reference'])} and so on).",
    )
    for section in fields(Config):
        summary = (section.default_factory.__doc__ or "").partition("\n")[0]  # type: ignore[union-attr]
        group = parser.add_argument_group(section.name, summary)
        for setting in SETTINGS.values():
            if setting.section == section.name:
                add_flag(group, setting)
    return parser


def describe_preset(name: str, without: Collection[str] = ()) -> str:
    """Its settings as flags, but for those of these names."""
    values = {setting: value for setting, value in PRESETS[name].items() if setting not in without}
    return ", ".join(f"{flag_of(setting)} {text_of(SETTINGS[setting], value)}" for setting, value in values.items())


def text_of(setting: Setting, value: Any) -> str:
    """A value as it is given to the flag."""
    if value is None and setting.is_auto_if_none:
        return "auto"
    if setting.takes_suffix and value is not None:
        return exact_count(value)
    return " ".join(value) if isinstance(value, list) else str(value)


def add_flag(group: Any, setting: Setting) -> None:
    text = describe_setting(setting).replace("%", "%%")
    if setting.kind is bool:
        group.add_argument(flag_of(setting.name), action=argparse.BooleanOptionalAction, help=text)
    elif setting.kind == list[str]:
        group.add_argument(flag_of(setting.name), nargs="+", metavar=setting.metavar, help=text)
    else:
        metavar = "{" + ",".join(setting.choices) + "}" if setting.choices else setting.metavar
        group.add_argument(flag_of(setting.name), metavar=metavar, help=text)


def describe_setting(setting: Setting) -> str:
    """The help text with its default, unless the text itself says what happens by default."""
    if setting.is_required:
        return f"{setting.help} Required."
    if setting.default is None or setting.default == []:
        return setting.help
    default = setting.default
    if setting.kind is bool:
        default = str(default).lower()
    elif isinstance(default, list):
        default = " ".join(default)
    return f"{setting.help} Default: {default}."


@dataclass(frozen=True, slots=True)
class DryRun:
    """--dry-run: for how many GPUs (None: as many as would run now), of which kind, used how well."""

    gpus: int | None = None
    gpu: str | None = None
    mfu: float | None = None


def take_dry_run(argv: Sequence[str]) -> tuple[DryRun | None, list[str]]:
    """What --dry-run asks for, if it is among the flags, and the other flags."""
    parser = Parser(allow_abbrev=False, add_help=False)
    parser.add_argument("--dry-run", nargs="?", const="")
    parser.add_argument("--gpu")
    parser.add_argument("--mfu")
    given, others = parser.parse_known_args(argv)
    if given.dry_run is None:
        return None, list(argv)
    if given.dry_run and not (given.dry_run.isdecimal() and int(given.dry_run)):
        raise ConfigError(f"--dry-run {given.dry_run} is not a number of GPUs. Give --dry-run 64, or --dry-run alone.")
    mfu = None if given.mfu is None else parse_number(given.mfu, float)
    if given.mfu is not None and not (mfu and 0 < mfu <= 1):
        raise ConfigError(f"--mfu {given.mfu} is not a share of the GPUs' peak above 0 and at most 1, such as 0.35.")
    return DryRun(int(given.dry_run) if given.dry_run else None, given.gpu, mfu), others


def read_flags(argv: Sequence[str], program: tuple[str, str], errors: list[str]) -> tuple[dict[str, Any], str | None]:
    """The values given as flags (`preset` among them), and the --config file. argv: without the program's name."""
    parser = build_parser(*program)
    known = [option for action in parser._actions for option in action.option_strings]
    namespace, unknown = parser.parse_known_args(join_negative_numbers(argv))
    given = vars(namespace)
    config_file = given.pop("config", None)
    unknown_flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    errors += [f"unknown flag {flag}{suggest(flag, known)}" for flag in unknown_flags]
    if unknown and not unknown_flags:  # after an unknown flag they are its values
        errors.append(f"{' '.join(unknown)} belongs to no flag")
    values = {"preset": given.pop("preset")} if "preset" in given else {}
    for name, text in given.items():
        try:
            values[name] = convert(SETTINGS[name], text)
        except ValueError as problem:
            errors.append(f"{flag_of(name)}: {problem}")
    return values, config_file


def join_negative_numbers(argv: Sequence[str]) -> list[str]:
    """`--lr -1e-4` -> `--lr=-1e-4`: argparse takes `-1e-4` for a flag, and the range check should see the number."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and NEGATIVE_NUMBER.fullmatch(word):
            joined[-1] += "=" + word
        else:
            joined.append(word)
    return joined


# ------------------------------------------------------------------------------------------------------------ YAML


def read_yaml(path: str | Path, errors: list[str]) -> dict[str, Any]:
    """The values in a YAML file. Read node by node rather than by safe_load: that keeps line numbers, and a repeated
    key does not silently win over the first."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        check_yaml(text)
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    except OSError as problem:
        errors.append(f"--config {path} cannot be read: {problem.strerror}")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as problem:
        errors.append(f"--config {path} is not valid YAML: {' '.join(str(problem).split())}")
        return {}
    values: dict[str, Any] = {}
    if isinstance(root, yaml.MappingNode):
        read_mapping(loader, root, None, values, path, errors)
    elif root is not None:
        errors.append(f"--config {path} is not a mapping; write lines like `student-hidden-size: 1536`")
    return values


#: At the default's 40 the likeliest few tokens hold next to nothing of a large vocabulary.
TEMPERATURE_OF_TOP_K = 1.0

#: Of one file that are worth listing: it is another file than was meant.
MOST_ERRORS = 50


def read_mapping(
    loader: yaml.SafeLoader,
    node: yaml.MappingNode,
    section: str | None,
    values: dict[str, Any],
    path: str | Path,
    errors: list[str],
) -> None:
    """Adds one mapping's settings to `values`: the top level (section None) or what stands under a section's name."""
    for key_node, value_node in node.value:
        key, where = str(key_node.value), f"{path} line {key_node.start_mark.line + 1}"
        if len(errors) >= MOST_ERRORS:
            if len(errors) == MOST_ERRORS:
                errors.append(f"{where}: from here on nothing was looked at, since {MOST_ERRORS} lines are wrong")
            return
        name = key.replace("-", "_")
        if section is None and name in SECTIONS:
            if isinstance(value_node, yaml.MappingNode):
                read_mapping(loader, value_node, name, values, path, errors)
            else:
                errors.append(f"{where}: section {key} has no `key: value` lines under it")
        elif name in values:
            errors.append(f"{where}: {key} is set twice")
        elif section is None and name == "preset":
            values[name] = _presets(loader, value_node, where, errors)
        elif name not in SETTINGS:
            known = [*SETTINGS, *SECTIONS, "preset"] if section is None else list(SETTINGS)
            errors.append(f"{where}: unknown key {key}{suggest(name, known)}")
        elif section not in (None, SETTINGS[name].section):
            errors.append(f"{where}: {key} belongs to section {SETTINGS[name].section}, not {section}")
        else:
            try:
                values[name] = convert(SETTINGS[name], loader.construct_document(value_node))
            except (ValueError, OverflowError, RecursionError, yaml.YAMLError) as problem:
                values[name] = None  # seen: a second one is still reported
                errors.append(f"{where}: {key}: {' '.join(str(problem).split())}")


def _presets(loader: yaml.SafeLoader, node: yaml.Node, where: str, errors: list[str]) -> list[str]:
    try:
        given = loader.construct_document(node)
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError) as problem:
        errors.append(f"{where}: preset: {' '.join(str(problem).split())}")
        return []
    return list(map(str, given)) if isinstance(given, list) else str(given).split()


# ---------------------------------------------------------------------------------------------------------- Config


def parse_config(argv: Sequence[str], program: tuple[str, str] = TRAINING) -> Config:
    """Flags -> Config, with the file that --config names underneath. ConfigError with one line per error.

    program: usage and purpose, for --help.
    """
    errors: list[str] = []
    flags, config_file = read_flags(argv, program, errors)
    values = {} if config_file is None else read_yaml(config_file, errors)
    return build_config([(f"--config {config_file}: ", values), ("", flags)], errors)


def given_values(argv: Sequence[str]) -> dict[str, Any]:
    """Setting -> value, of what flags and the file of --config give: without presets and defaults."""
    errors: list[str] = []
    flags, config_file = read_flags(argv, TRAINING, errors)
    values = {} if config_file is None else read_yaml(config_file, errors)
    return values | flags


def presets_of(argv: Sequence[str]) -> list[str]:
    """The names that --preset gives, on the command line or in the file."""
    return given_values(argv).get("preset", [])


def load_yaml(path: str | Path) -> Config:
    """The Config in a file, as --config alone would read it."""
    errors: list[str] = []
    return build_config([(f"{path}: ", read_yaml(path, errors))], errors)


def build_config(sources: Sequence[tuple[str, dict[str, Any]]], errors: list[str]) -> Config:
    """The Config of these (where errors find it, values), a later one over an earlier one, above their presets."""
    presets: list[str] = []
    for _, values in sources:
        presets = values.pop("preset", presets)
    unknown = [name for name in presets if name not in PRESETS]
    errors += [f"--preset {name} is unknown; expected are any of {', '.join(PRESETS)}" for name in unknown]
    for where, values in sources:
        errors += refuse_several(budgets_in(values), where)
    if errors:
        raise ConfigError("\n".join(errors))
    config = Config()
    given = [*(PRESETS[preset] for preset in presets), *(values for _, values in sources)]
    for values in given:
        apply(config, values)
    if config.loss.kl_top_k is not None and not any("kl_temperature" in values for values in given):
        config.loss.kl_temperature = TEMPERATURE_OF_TOP_K
    return config


def apply(config: Config, values: Mapping[str, Any]) -> None:
    """Set these settings. If a budget is among them it takes the place of whichever there was, and so does one of
    two settings that say the same."""
    budget = budgets_in(values)
    if budget:
        config.training = replace(config.training, **{name: SETTINGS[name].default for name in BUDGETS})
    for names in ALTERNATIVES:
        if any(values.get(name) is not None for name in names):
            config.optimizer = replace(config.optimizer, **{name: SETTINGS[name].default for name in names})
    others = {name: value for name, value in values.items() if name not in BUDGETS}
    for name, value in (others | budget).items():
        setattr(getattr(config, SETTINGS[name].section), name, value)


def save_yaml(config: Config, path: str | Path) -> None:
    """Writes every setting, by section. The file appears complete or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    body = yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=False)
    head = f"# Resolved configuration, megatron_lrc {__version__}. Read it back with --config.\n"
    try:
        partial.write_text(head + body)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def describe_changes(config: Config, sections: Collection[str] | None = None) -> list[str]:
    """What differs from the defaults, one `--flag value` each: short enough for the console. sections: only these."""
    lines = []
    for setting in SETTINGS.values():
        if sections is not None and setting.section not in sections:
            continue
        value = getattr(getattr(config, setting.section), setting.name)
        if value == setting.default:
            continue
        if setting.kind is bool:
            lines.append(flag_of(setting.name) if value else flag_of(f"no_{setting.name}"))
        elif setting.name != "train_iters" or not is_counted(config.training):
            lines.append(f"{flag_of(setting.name)} {text_of(setting, value)}")
    return lines
