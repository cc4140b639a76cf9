"""What an earlier commit wrote (fixtures/old_checkpoints) holds for this one what it held for that one."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_lrc.commands.main import main
from megatron_lrc.hf.content_hash import PREFIX
from ranks import run_ranks
from stored_tensors import digest, read_objects, read_tensors, without_padding
from tools_path import convert_to_hf

pytestmark = pytest.mark.distributed

OLD = Path(__file__).parents[1] / "fixtures/old_checkpoints"
EXPECTED = json.loads((OLD / "expected.json").read_text())
VOCAB = 61
LAYOUTS = {"TP1": (1, "1", "1"), "TP2+SPxPP2": (4, "2", "2"), "TP2+SP": (2, "2", "1"), "PP2": (2, "1", "2")}


@pytest.mark.parametrize("run", EXPECTED)
def test_an_export_of_an_old_checkpoint_has_the_weights_that_it_had_then(tmp_path, run):
    """The teacher's weights have few bits, so products with projections are alike on every machine."""
    output = tmp_path / "exported"
    flags = ["--load", str(OLD / run), "--teacher", str(OLD / "teacher"), "--output", str(output)]
    assert convert_to_hf(flags) == 0
    weights = load_file(output / "model.safetensors")
    assert {name: digest(weight) for name, weight in weights.items()} == EXPECTED[run]["exported"]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name == "TP1" else pytest.mark.slow) for name in LAYOUTS]
)
@pytest.mark.parametrize("run", EXPECTED)
def test_a_run_that_goes_on_from_an_old_checkpoint_holds_what_it_held_then(tmp_path, run, layout):
    """Parameters, Adam's moments and counts, seen in what the run saves again without a step in between."""
    ranks, tp, pp = LAYOUTS[layout]
    model = ["--student" if run == "ordinary" else "--teacher", str(OLD / "teacher")]
    data = ["--data-path", str(OLD / "data/counting"), "--data-cache-path", str(tmp_path / "cache")]
    places = ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
    places.append("--sequence-parallel" if tp == "2" else "--no-sequence-parallel")
    flags = ["--config", str(OLD / run / "config.yaml"), *model, *data, *places]
    flags += ["--load", str(OLD / run), "--save", str(tmp_path / "run")]
    assert run_ranks(ranks, main, ["train", *flags]) == [0] * ranks

    expected = EXPECTED[run]
    saved = tmp_path / "run/iter_0000003"
    held = without_padding(read_tensors(saved), VOCAB)
    assert {key: digest(tensor) for key, tensor in held.items()} == expected["held"]
    assert read_objects(saved)["num_updates"] == expected["num_updates"]
    state = json.loads((saved / "run.json").read_text())["state"]
    assert {key: state[key] for key in expected["counts"]} == expected["counts"]
    assert state["teacher_fingerprint"].startswith(PREFIX) == (run != "ordinary")  # over every byte from now on
