"""What only several GPUs can show: layouts over NCCL give what one GPU gives, and overlapped communication too."""

from functools import cache
from pathlib import Path

import pytest
import torch
from gpu_runs import difference, train, write_teacher

from tiny_data import write_counting

RANKS = 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"needs {RANKS} CUDA GPUs"),
]

LOCAL, ENGINE = "--transformer-impl local", "--transformer-impl transformer_engine"
TP = "--tensor-model-parallel-size 2 --sequence-parallel"
DISTRIBUTED = "--use-distributed-optimizer"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """`trained(flags, ranks)` -> records of three steps, each run made once."""
    folder = tmp_path_factory.mktemp("gpus")
    teacher, data = write_teacher(folder / "teacher"), write_counting(folder / "text")

    @cache
    def trained(flags: str, ranks: int = RANKS) -> list[dict]:
        run: Path = folder / f"{ranks}-{flags.replace('--', '').replace(' ', '-')}"
        return train(run, teacher, data, 3, flags, ranks=ranks)

    return trained


@pytest.mark.parametrize("layout", [TP, "--pipeline-model-parallel-size 2", "--context-parallel-size 2", DISTRIBUTED])
def test_a_layout_gives_what_one_gpu_gives(trained, measured, layout):
    measured(f"fp32, {layout} against one GPU", difference(trained(f"{LOCAL} {layout}"), trained(LOCAL, 1)), 1e-3)


def test_overlapped_sums_and_gathers_change_nothing(trained, measured):
    overlap = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 50000"
    found = trained(f"{LOCAL} {DISTRIBUTED} {overlap}")
    measured(f"fp32, {overlap}", difference(found, trained(f"{LOCAL} {DISTRIBUTED}")), 1e-4)


@pytest.mark.parametrize("overlap", ["", "--overlap-grad-reduce --ddp-bucket-size 50000"])
def test_replicas_that_share_compose_change_nothing(trained, measured, overlap):
    flags = f"{LOCAL} {DISTRIBUTED} --share-compose {overlap}".strip()
    measured(f"fp32, {flags}", difference(trained(flags), trained(f"{LOCAL} {DISTRIBUTED}")), 1e-4)


@pytest.mark.parametrize("method", ["", "--method ordinary --init random --init-method-std 0.02"])
def test_userbuffers_change_nothing_but_rounding(trained, measured, needs_engine, method):
    flags = f"{ENGINE} --bf16 {TP} {method}".strip()
    keys = ("loss",) if method else ("loss", "clone_loss")
    found = trained(f"{flags} --tp-comm-overlap")
    measured(f"bf16, --tp-comm-overlap {method}".strip(), difference(found, trained(flags), keys), 2e-2)
