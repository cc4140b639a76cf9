"""Every start of a run leaves a line, lost work is counted, and what is shown elsewhere goes on where it was."""

import contextlib
import io
import json
import os
import re
import shutil
import socket
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_lrc.clone.fusion import why_nothing_is_compiled
from megatron_lrc.config import Config
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.locks import lock_of_run
from megatron_lrc.mcore import kernels
from megatron_lrc.mcore.compiler import agree_on_compiler
from megatron_lrc.report.run_page import write_report
from megatron_lrc.train import loop
from megatron_lrc.train.boards import WANDB_ID_FILE
from ranks import run_ranks
from runs import continued, make_config, make_trainer, on_layout, records


@pytest.fixture
def five_step_config(tiny_llama, tiny_text, tmp_path) -> Config:
    config = make_config(tiny_llama(), tiny_text, tmp_path / "run", steps=5)
    config.checkpoint.save_interval = 3
    return config


def train(config: Config, ranks: int = 1, **environment: str) -> None:
    run_ranks(ranks, train_in, config.resolved(ranks), environment)


def train_in(config: Config, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    loop.train(config)


def train_with_a_crash(config: Config, **environment: str) -> Path:
    """Five steps, of which the last two are lost, then on to seven on other ranks."""
    train(config, **environment)
    run = Path(config.checkpoint.save or "")
    shutil.rmtree(run / "iter_0000005")
    train(on_layout(continued(config, steps=7), pp=2), 2, **environment)
    return run


class TorchWithCuda(types.ModuleType):
    """torch, but that there seems to be a GPU."""

    cuda = types.SimpleNamespace(is_available=lambda: True)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def lines_at_start(config: Config) -> list[str]:
    kernels.torch = TorchWithCuda("torch")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        make_trainer(config)
    return said.getvalue().splitlines()


@pytest.mark.distributed
def test_a_start_on_cuda_says_what_computes_and_what_is_missing(five_step_config):
    """Models are built on the CPU here; `kernels` alone believes in a GPU."""
    five_step_config.training.bf16 = True
    (lines,) = run_ranks(1, lines_at_start, five_step_config.resolved(1))
    own = "layers by megatron-core's own modules, torch's attention; matrix products in bf16, logits in fp32 from bf16"
    assert f"{own} operands; torch's AdamW" in lines
    assert len([line for line in lines if line.startswith("warning: Transformer Engine is not installed, so")]) == 1


def reasons_after(*problems_of_rank_1: str | None) -> list[str | None]:
    reasons = []
    for problem in problems_of_rank_1:
        agree_on_compiler(problem if dist.get_rank() == 1 else None)
        reasons.append(why_nothing_is_compiled())
    return reasons


@pytest.mark.distributed
def test_where_one_rank_has_no_compiler_none_compiles():
    first, second = run_ranks(2, reasons_after, "Failed to find C compiler", None)
    assert first == second == [f"on rank 1 ({socket.gethostname()}): Failed to find C compiler", None]


@pytest.mark.distributed
def test_a_start_says_what_it_goes_on_from_and_what_was_lost(five_step_config):
    logged = train_with_a_crash(five_step_config) / "metrics.jsonl"
    first, second = (json.loads(line) for line in logged.with_name("starts.jsonl").read_text().splitlines())
    assert (first["step"], first["checkpoint"], first["lost_steps"], first["lost_seconds"]) == (0, None, 0, 0)
    teacher = open_teacher(describe_teacher(str(five_step_config.model.teacher)))
    assert first["weights"] == second["weights"] == teacher.fingerprint()
    assert (second["step"], second["lost_steps"], second["train_iters"]) == (3, 2, 7)
    assert Path(second["checkpoint"]).name == "iter_0000003"
    seconds_per_step = [record["step_seconds"] for record in records(logged.parent)]
    assert 0 < second["lost_seconds"] < 100 * sum(seconds_per_step)
    assert (first["world_size"], second["world_size"], second["hosts"]) == (1, 2, 1)
    assert second["layout"] == {"tp": 1, "pp": 2, "cp": 1, "dp": 1}
    assert set(second["versions"]) == {"megatron_lrc", "torch", "megatron_core", "python"}
    assert first["time"] <= second["time"] <= records(logged.parent)[-1]["time"]
    assert [record["step"] for record in records(logged.parent)] == [1, 2, 3, 4, 5, 6, 7]

    page = write_report(logged.parent, None).read_text()
    assert "2 steps lost" in page and "finished" in page and "run/iter_0000003" in page


@pytest.mark.distributed
def test_a_run_that_another_process_is_at_work_in_is_refused_on_every_rank_and_left_as_it_is(five_step_config):
    run = Path(five_step_config.checkpoint.save or "")
    second = on_layout(continued(five_step_config, steps=7), pp=2)
    second.checkpoint.load = "auto"
    with lock_of_run(run):
        (run / "iter_0000003.partial-ab").mkdir()  # the first one's save, under way
        before = sorted(run.iterdir())
        with pytest.raises(AssertionError) as failure:
            train(second, 2)
        assert sorted(run.iterdir()) == before
    refusal = f"--save {run} is being written by another process (process {os.getpid()} on "
    assert f"ConfigError: {refusal}" in str(failure.value) and "rank 1: " in str(failure.value)
    train(second, 2)
    assert [record["step"] for record in records(run)][-1] == 7 and not (run / ".lock").exists()


@pytest.mark.distributed
def test_a_continued_run_is_the_same_run_of_weights_and_biases(five_step_config):
    pytest.importorskip("wandb")
    five_step_config.logging.wandb_project, five_step_config.logging.wandb_exp_name = "clones", "first"
    run = train_with_a_crash(five_step_config, WANDB_MODE="offline")
    name = (run / WANDB_ID_FILE).read_text().strip()
    kept = sorted((run / "wandb").glob("offline-run-*"))
    assert len(kept) == 2 and all(folder.name.endswith(name) for folder in kept)
    given = [_given_steps(folder / f"run-{name}.wandb") for folder in kept]
    assert given == [[0, 1, 2, 3, 4, 5, 5], [4, 5, 6, 7, 7]]  # the validations' among them


@pytest.mark.distributed
def test_a_run_goes_on_without_weights_and_biases_when_that_fails(five_step_config, tmp_path):
    pytest.importorskip("wandb")
    five_step_config.logging.wandb_project = "clones"
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:1", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "2"}
    train(five_step_config, WANDB_MODE="online", **nobody)
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4, 5]


def _given_steps(file: Path) -> list[int]:
    """The steps that W&B was given: the one-digit values of items named `step`, as protobuf has them."""
    found = [int(digit) for digit in re.findall(rb"\x04step\x82\x01\x01(\d)", file.read_bytes())]
    assert found[::2] == found[1::2], "each once in the history, once in the summary"
    return found[::2]
