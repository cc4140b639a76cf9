"""What a run's data flags name: blends of datasets, and the parts of them for training and validation."""

import math
import os
from dataclasses import dataclass

from megatron_lrc.config import Config, ConfigError, parse_split


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Dataset prefixes and their weights, as one flag gives them. No weights: in proportion to the tokens."""

    flag: str
    prefixes: list[str]
    weights: list[float] | None


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """What training and validation draw from: a blend (None: no data), the part (from, to) of its documents."""

    train: Blend | None
    valid: Blend | None
    train_part: tuple[float, float] = (0.0, 1.0)
    valid_part: tuple[float, float] = (0.0, 1.0)


def plan_data(config: Config) -> DataPlan:
    """The blends and parts that the data flags ask for. No validation with --eval-iters 0 or an empty second part."""
    data, wants_valid = config.data, config.logging.eval_iters > 0
    if data.data_path and (data.train_data_path or data.valid_data_path):
        raise ConfigError(
            "--data-path is divided by --split and excludes --train-data-path and --valid-data-path. Give "
            "one or the other."
        )
    if not data.data_path:
        if data.valid_data_path and not data.train_data_path:
            raise ConfigError("--valid-data-path stands beside --train-data-path, which is missing. Give both.")
        valid = _read_blend("--valid-data-path", data.valid_data_path) if wants_valid else None
        return DataPlan(train=_read_blend("--train-data-path", data.train_data_path), valid=valid)
    blend = _read_blend("--data-path", data.data_path)
    train_part, valid_part = _read_split(data.split)
    has_valid = wants_valid and valid_part[1] > valid_part[0]
    return DataPlan(train=blend, valid=blend if has_valid else None, train_part=train_part, valid_part=valid_part)


def dataset_prefixes(plan: DataPlan) -> list[str]:
    """Each dataset once."""
    blends = [blend for blend in (plan.train, plan.valid) if blend]
    return list(dict.fromkeys(prefix for blend in blends for prefix in blend.prefixes))


def _read_blend(flag: str, values: list[str]) -> Blend | None:
    """[P], [P1, P2, ...] or [W1, P1, W2, P2, ...], told apart as megatron-core's get_blend_from_list does it."""
    if not values:
        return None
    numbers = [_as_number(value) for value in values[::2]]
    if len(values) % 2 or all(number is None for number in numbers):
        return Blend(flag=flag, prefixes=[os.path.abspath(value) for value in values], weights=None)
    weights = [number for number in numbers if number is not None and 0 < number < math.inf]
    if len(weights) < len(numbers):
        raise ConfigError(
            f"{flag} {' '.join(values)}: weights and prefixes do not alternate, or a weight is not above 0 and finite. "
            "Give prefixes only, or W1 PREFIX1 W2 PREFIX2 ... with every weight a number above 0."
        )
    return Blend(flag=flag, prefixes=[os.path.abspath(value) for value in values[1::2]], weights=weights)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _read_split(split: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """The training and validation parts of --split, as fractions of the documents."""
    shares = parse_split(split)
    if shares is None or shares[0] == 0:
        raise ConfigError(
            f"--split {split}: expected up to three shares (training, validation, test) of 0 or more, the "
            "first above 0, such as 969,30,1."
        )
    total = sum(shares)
    train, valid = shares[0] / total, shares[1] / total
    return (0.0, train), (train, train + valid)
