"""tools/plan.py layers measures each layer as transformers' own model of the teacher says, and names those to keep."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from hf_teachers import write_llama, write_qwen2, write_qwen3
from megatron_lrc.config import describe_layers, most_important, parse_config, student_layers
from megatron_lrc.data.datasets import first_samples
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.rope import rotations
from megatron_lrc.hf.teacher import TeacherReader
from megatron_lrc.mcore import layer_by_layer
from megatron_lrc.mcore.layer_importance import layer_importance
from megatron_lrc.verify.weight_streams import stream_weights
from tools_path import tool_main

plan_main = tool_main("plan")
LAYERS, VOCAB = 4, 301


def a_batch() -> dict[str, torch.Tensor]:
    """Five sequences of 16 tokens, of which a part does not count."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCAB, (5, 17), generator=generator)
    mask = (torch.rand(5, 16, generator=generator) < 0.7).float()
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask}


def by_transformers(directory: Path, batch: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Both measures of each layer, by definition."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    streams, layers = [], list(model.model.layers)
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0])) for layer in layers]
    hooks += [
        layers[-1].register_forward_hook(lambda _, __, out: streams.append(out[0] if isinstance(out, tuple) else out))
    ]

    def loss() -> float:
        with torch.no_grad():
            logits = model(batch["tokens"], use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        return ((losses * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()).item()

    whole, found = loss(), {}
    cosines = [F.cosine_similarity(before, after, dim=-1).mean() for before, after in pairwise(streams)]
    found["hidden-state"] = [1 - cosine.item() for cosine in cosines]
    for hook in hooks:
        hook.remove()
    found["loss"] = []
    for layer in layers:
        model.model.layers = torch.nn.ModuleList(other for other in layers if other is not layer)
        found["loss"].append(loss() - whole)
    return found


@pytest.mark.parametrize(("write", "is_tied"), [(write_llama, True), (write_qwen2, False), (write_qwen3, True)])
def test_both_measures_are_those_of_transformers(tmp_path: Path, monkeypatch, write: Callable, is_tied: bool) -> None:
    """Also where few sequences pass a layer together."""
    write(tmp_path, is_tied=is_tied, num_layers=LAYERS)
    monkeypatch.setattr(layer_by_layer, "TOKENS_AT_ONCE", 32)
    batch, teacher = a_batch(), describe_teacher(tmp_path)
    expected = by_transformers(tmp_path, batch)
    for measure, figures in expected.items():
        weights = stream_weights(teacher.family, teacher.shape, TeacherReader(teacher).weight)
        found = layer_importance(measure, weights, teacher.shape, rotations(teacher, batch["tokens"].shape[1]), batch)
        assert found == pytest.approx(figures, rel=1e-4, abs=1e-6), measure
        assert max(found) - min(found) > 1e-3, "layers that are alike prove nothing"


def flags_for(teacher: Path | str, data: str, *more: str) -> list[str]:
    return ["--teacher", str(teacher), "--data-path", data, "--seq-length", "32", "--calibration-tokens", "100", *more]


def test_the_tool_names_the_layers_that_matter_most_as_a_flag(tmp_path, tiny_text, capsys):
    """Over the run's first tokens, in whole sequences. What it prints, training takes."""
    write_qwen3(tmp_path, num_layers=LAYERS)
    flags = flags_for(tmp_path, tiny_text, "--student-num-layers", "2", "--layer-importance", "hidden-state", "loss")
    assert plan_main(["layers", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    config = parse_config(flags_for(tmp_path, tiny_text))
    batch = first_samples(config, 4)
    assert batch["tokens"].shape == (4, 32) and torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert lines[0].split() == ["layer", "hidden-state", "loss"] and len(lines) == 1 + LAYERS + 2
    for column, (line, figures) in enumerate(zip(lines[-2:], by_transformers(tmp_path, batch).values(), strict=True)):
        printed = [row.split()[1 + column] for row in lines[1 : 1 + LAYERS]]
        assert [float(text.rstrip("*")) for text in printed] == pytest.approx(figures, abs=2e-4)
        kept = tuple(layer for layer, text in enumerate(printed) if text.endswith("*"))
        assert kept == most_important(figures, 2) and f"--student-layers {describe_layers(kept)}" in line
        trained = parse_config(["--student-layers", *line.partition("--student-layers ")[2].split()])
        assert student_layers(trained.model, LAYERS) == kept


def test_a_longer_run_begins_with_the_same_tokens(tiny_llama, tiny_text):
    flags = flags_for(tiny_llama(), tiny_text)
    few = first_samples(parse_config(flags), 2)
    many = first_samples(parse_config([*flags, "--train-tokens", "1M", "--global-batch-size", "8"]), 6)
    assert all(torch.equal(few[name], many[name][:2]) for name in few)


def test_as_json_and_without_a_number_every_layer_is_ranked(tiny_llama, tiny_text, capsys):
    assert plan_main(["layers", *flags_for(tiny_llama(num_layers=3), tiny_text), "--json"]) == 0
    ((measure, found),) = json.loads(capsys.readouterr().out).items()
    assert measure == "hidden-state" and len(found["importance"]) == 3 and found["kept"] == [0, 1, 2]


def test_those_that_matter_most_keep_their_order_and_the_earlier_of_equal_ones():
    assert most_important([0.5, 0.1, 0.9, 0.5, 0.5], 3) == (0, 2, 3)
    assert most_important([0.5, 0.1], 2) == (0, 1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data-path", "unused"], "--teacher is missing"),
        (["--teacher", "TEACHER"], "--layer-importance is measured on training tokens. Give --data-path"),
        (
            ["--teacher", "TEACHER", "--data-path", "DATA", "--student-layers", "0", "2"],
            "--student-layers 0 2 names them",
        ),
        (["--teacher", "TEACHER", "--data-path", "DATA", "--student-num-layers", "9"], "is above the teacher's 2"),
        (["--teacher", "TEACHER", "--data-path", "DATA", "--student-num-layers", "0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_a_sentence(flags, said, tiny_llama, tiny_text, capsys):
    places = {"TEACHER": tiny_llama(), "DATA": tiny_text}
    assert plan_main(["layers", *(places.get(flag, flag) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
