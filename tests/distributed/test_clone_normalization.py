"""--clone-normalization token in runs: where its constants come from, and go on from."""

from dataclasses import replace

import pytest
import torch

from megatron_lrc.config import Config, ConfigError
from megatron_lrc.train.start_checks import check
from runs import continued, make_config, records, saving, train
from stored_tensors import read_tensors

pytestmark = pytest.mark.distributed


def relative(config: Config) -> Config:
    projection = replace(config.projection, calibration_tokens=64)
    return replace(config, loss=replace(config.loss, clone_normalization="token"), projection=projection)


def test_a_run_made_without_it_is_no_start_but_its_weights_are(tiny_llama, tiny_text, tmp_path):
    plain = make_config(tiny_llama(), tiny_text, tmp_path / "plain", steps=1)
    train(plain)
    with pytest.raises(ConfigError, match="made without --clone-normalization token.* --pretrained-checkpoint"):
        check(continued(relative(plain), steps=2), 1)
    check(continued(plain, steps=2), 1)  # as it was made
    started = saving(relative(plain), save=str(tmp_path / "relative"), pretrained_checkpoint=str(tmp_path / "plain"))
    train(started)
    (line,) = records(tmp_path / "relative")
    assert 0 < line["clone_loss"] < 3 * 2 * 7  # some part of each of 14 targets; squared errors were as they came
    energies = read_tensors(tmp_path / "relative" / "iter_0000001")["clone_energies.layers.1"]
    assert energies.dtype == torch.float64 and (energies > 0).all()
