"""Stages as a run builds them, for tests that look at them or step them by hand."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_lrc.config import Config
from megatron_lrc.hf.families import TeacherDescription
from megatron_lrc.hf.reader import Reader
from megatron_lrc.methods import method_of
from megatron_lrc.methods.method import Materials


def _no_data() -> Any:
    raise AssertionError("these stages need no calibration")


def build_stages(
    config: Config,
    base: TeacherDescription,
    reader: Reader,
    groups: Any,
    dtype: torch.dtype,
    *,
    is_new: bool = False,
    has_changed: bool = False,
    calibration: Callable[[], Any] = _no_data,
) -> Any:
    """This rank's stages of the configuration's method. Unless is_new what is trained has no values yet."""
    return method_of(config).build_stages(Materials(base, reader, groups, dtype, calibration, is_new, has_changed))
