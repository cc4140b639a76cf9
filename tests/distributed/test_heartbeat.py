"""Under ft_launcher, where it is installed: a rank that hangs is killed, and the run goes on by itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lrc.config import save_yaml
from runs import assert_same_parameters, make_config, records, train

pytest.importorskip("nvidia_resiliency_ext")
pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
#: Loaded by each process as it starts: step 3 of the run's first life hangs, as a machine that fails may have it.
HANG = """
import os, signal, sys

if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and "train" in sys.argv:
    from megatron_lrc.train import loop

    look_at = loop.Trainer._look_at

    def look_and_hang(self, report):
        look_at(self, report)
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGSTOP)

    loop.Trainer._look_at = look_and_hang
"""


def test_a_rank_that_hangs_is_restarted_and_the_run_goes_on(tiny_llama, tiny_text, tmp_path):
    config = make_config(tiny_llama(), tiny_text, tmp_path / "whole", steps=5)
    train(config)
    config.checkpoint.save, config.checkpoint.load, config.checkpoint.save_interval = str(tmp_path / "run"), "auto", 2
    save_yaml(config, tmp_path / "config.yaml")
    (tmp_path / "sitecustomize.py").write_text(HANG)
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "pretrain_lrc.sh"), "--config", str(tmp_path / "config.yaml")],
        env=os.environ
        | {
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
            "GPUS_PER_NODE": "1",
            "MAX_RESTARTS": "1",
            "LAUNCHER": "ft_launcher",
            "LAUNCHER_FLAGS": "--ft-rank-heartbeat-timeout=10 --ft-workload-check-interval=1 "
            "--ft-enable-nic-monitor=False",
        },
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"continues {tmp_path / 'run' / 'iter_0000002'} at step 2" in done.stdout
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2, 3, 4, 5]
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 2]
    assert_same_parameters(tmp_path / "run", tmp_path / "whole")
