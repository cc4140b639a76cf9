"""tools/mask_neurons.py: masks with known answers, scores with known answers, and what it refuses."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_data
from checkpoints import write_run
from hf_teachers import write_llama, write_qwen2, write_qwen3
from megatron_lrc.clone.kept_rows import KeptRows
from megatron_lrc.config import ConfigError
from megatron_lrc.evaluation.neurons import masked, mean_activations, most_active, random_neurons
from megatron_lrc.evaluation.questions import accuracy, encode_questions, padded, read_questions
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.kept_file import write_kept
from students import random_student
from tools_path import convert_to_hf, tool_main

mask_neurons: Callable[[list[str]], int] = tool_main("mask_neurons")
TOKENS = torch.arange(60).view(3, 20) * 7 % 301
LAYERS, WIDTH = 2, 80  # of hf_teachers' models

families = pytest.mark.parametrize("write", [write_llama, write_qwen2, write_qwen3])


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(TOKENS).logits


def chosen(*places: tuple[int, int]) -> torch.Tensor:
    neurons = torch.zeros(LAYERS, WIDTH, dtype=torch.bool)
    for place in places:
        neurons[place] = True
    return neurons


def write_pair(folder: Path) -> None:
    """A teacher, a run with a student of it, that student's export, and held-out text."""
    write_llama(folder / "teacher")
    description = describe_teacher(folder / "teacher")
    write_run(folder / "run", description, *random_student(description, 28, has_lm_head=True))
    assert convert_to_hf(["--load", str(folder / "run"), "--output", str(folder / "student")]) == 0
    tiny_data.write_jsonl(folder / "text.jsonl", ["a small language model is cloned", "from a large language model"])
    items = [
        {"prompt": f"a {word} language", "choices": [" model", " small", " is cloned"], "answer": number % 3}
        for number, word in enumerate(["small", "large", "cloned", "language", "model"])
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def run_tool(folder: Path, *flags: str, student: str = "student", teacher: str = "teacher") -> dict:
    output = folder / "masking.json"
    paths = {"--teacher": folder / teacher, "--student": folder / student, "--output": output}
    arguments = [str(text) for pair in paths.items() for text in pair]
    assert mask_neurons([*arguments, *flags]) == 0
    return json.loads(output.read_text())


def refused(capsys: pytest.CaptureFixture[str], *flags: Path | str) -> str:
    assert mask_neurons([str(flag) for flag in flags]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("mask_neurons.py: ")
    return said


# ------------------------------------------------------------------------------------------------ masks


@families
def test_a_layer_without_neurons_has_no_mlp(tmp_path: Path, write: Callable) -> None:
    model = write(tmp_path / "model")
    neurons = chosen()
    neurons[1] = True
    with masked(model, neurons):
        found = logits_of(model)
    assert not torch.equal(found, logits_of(model))
    model.model.layers[1].mlp.forward = lambda hidden: torch.zeros_like(hidden)
    assert torch.equal(found, logits_of(model))


@families
def test_masked_neurons_are_zeroed_columns_of_down_proj(tmp_path: Path, write: Callable) -> None:
    model = write(tmp_path / "model")
    with masked(model, chosen((0, 3), (0, 79), (1, 40))):
        found = logits_of(model)
    unmasked = logits_of(model)
    assert not torch.allclose(found, unmasked)
    with torch.no_grad():
        for layer, columns in ((0, [3, 79]), (1, [40])):
            model.model.layers[layer].mlp.down_proj.weight[:, columns] = 0
    assert torch.allclose(found, logits_of(model), atol=1e-5)


def test_nothing_stays_behind(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    before = logits_of(model)
    with masked(model, chosen((0, 1), (1, 2))):
        pass
    mean_activations(model, [(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))])
    assert torch.equal(before, logits_of(model))


# ------------------------------------------------------------------------------------------------ which neurons


def test_activations_are_means_over_real_tokens(tmp_path: Path) -> None:
    """In batches with padding the same as one sequence after another, computed from the MLP's own parts."""
    model = write_llama(tmp_path / "model")
    sequences = [TOKENS[0].tolist(), TOKENS[1, :7].tolist(), TOKENS[2, :2].tolist()]
    found = mean_activations(model, [padded(sequences[:2]), padded(sequences[2:])])
    inputs: list[torch.Tensor] = []
    mlp = model.model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda module, values: inputs.append(values[0].detach()))
    for sequence in sequences:
        model(torch.tensor([sequence]))
    hidden = torch.cat([value[0] for value in inputs])
    activations = torch.nn.functional.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
    assert torch.allclose(found[1].float(), activations.abs().mean(0), rtol=1e-4)


def test_the_most_active_are_taken_from_the_model_or_from_each_layer() -> None:
    means = torch.arange(LAYERS * WIDTH, dtype=torch.float64).view(LAYERS, WIDTH)
    assert most_active(means, 2, "model").nonzero().tolist() == [[1, 78], [1, 79]]
    assert most_active(means, 1, "layer").nonzero().tolist() == [[0, 79], [1, 79]]
    with pytest.raises(ConfigError, match="--num-neurons 41: there are 80 neurons in a layer"):
        most_active(means, 41, "layer")


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_random_neurons_follow_from_the_seed_and_leave_out_the_important_ones(scope) -> None:
    important = most_active(torch.rand(LAYERS, WIDTH), 30, scope)
    first, again, other = (random_neurons(important, 30, scope, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.sum() == important.sum() and not (first & important).any()
    if scope == "layer":
        assert first.sum(1).tolist() == [30, 30]


# ------------------------------------------------------------------------------------------------ scores


def test_the_right_continuation_is_the_likelier_one(tmp_path: Path) -> None:
    """Against likelihoods of one continuation at a time; the batch size changes nothing."""
    write_pair(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    questions = read_questions(tmp_path / "items.jsonl")
    hits = 0
    for question in questions:
        found = []
        for choice in question.choices:
            ids = tokenizer(question.prompt + choice)["input_ids"]
            start = len(tokenizer(question.prompt)["input_ids"])
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            found.append(sum(log_p[place - 1, ids[place]].item() for place in range(start, len(ids))))
        hits += found.index(max(found)) == question.answer
    assert 0 < hits < len(questions)
    continuations = encode_questions(questions, tokenizer)
    for batch_size in (1, 4, 100):
        score = accuracy(model, questions, continuations, batch_size=batch_size, vocab_size=301)
        assert score == hits / len(questions)


@pytest.mark.parametrize("line", ["[]", '{"prompt": "a", "choices": ["b"], "answer": 0}', '{"prompt": "a"}', "x"])
def test_a_line_that_is_no_item_is_named(tmp_path: Path, line: str) -> None:
    good = '{"prompt": "a", "choices": [" b", " c"], "answer": 1}'
    (tmp_path / "items.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ConfigError, match="items.jsonl:2 is no item"):
        read_questions(tmp_path / "items.jsonl")
    (tmp_path / "items.jsonl").write_text(good.replace("1}", "2}"))
    with pytest.raises(ConfigError, match="no index of the choices"):
        read_questions(tmp_path / "items.jsonl")


# ------------------------------------------------------------------------------------------------ the tool


@pytest.mark.parametrize("source", ["items", "input"])
def test_teacher_and_student_are_scored_under_three_conditions(
    tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run and its export alike; the same again for the same seeds."""
    write_pair(tmp_path)
    data = str(tmp_path / ("items.jsonl" if source == "items" else "text.jsonl"))
    flags = [f"--{source}", data, "--num-neurons", "30", "--num-seeds", "2", "--scope", "layer"]
    found = run_tool(tmp_path, *flags)
    printed = capsys.readouterr().out
    assert run_tool(tmp_path, *flags, student="run")["models"] == found["models"]
    assert {layer: len(neurons) for layer, neurons in found["important"].items()} == {"0": 30, "1": 30}
    for scores in found["models"].values():
        seeds = scores["random"]["by_seed"]
        assert list(seeds) == ["0", "1"]
        assert scores["random"]["accuracy"] == pytest.approx(sum(s["accuracy"] for s in seeds.values()) / 2)
    assert "paper, student" in printed and "30 neurons in every layer" in printed
    if source == "input":
        losses = found["models"]["teacher"]
        assert losses["unmasked"]["lm_loss"] != losses["important"]["lm_loss"] != losses["random"]["lm_loss"]
        assert "LM loss" in printed


def test_a_teacher_beside_itself_scores_alike(tmp_path: Path) -> None:
    write_pair(tmp_path)
    found = run_tool(tmp_path, "--input", str(tmp_path / "text.jsonl"), student="teacher")["models"]
    assert found["teacher"] == found["student"]


def test_a_student_of_a_part_is_masked_where_its_teacher_is(tmp_path: Path) -> None:
    """One without a layer that adds nothing, and without neurons that add nothing, scores as the one that has them."""
    write_pair(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    first, second = model.model.layers
    mlp, kept = second.mlp, torch.arange(1, WIDTH, 2)
    for silent in (first.self_attn.o_proj.weight, first.mlp.down_proj.weight, mlp.down_proj.weight[:, ::2]):
        silent.data.zero_()
    for name in ("long", "short"):
        shutil.copytree(tmp_path / "teacher", tmp_path / name)
    model.save_pretrained(tmp_path / "long")
    second.self_attn.layer_idx = 0
    model.model.layers = torch.nn.ModuleList([second])
    model.config.num_hidden_layers, model.config.intermediate_size = 1, len(kept)
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, kept].contiguous())
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = torch.nn.Parameter(linear.weight[kept])
    model.save_pretrained(tmp_path / "short")
    flags = ["--input", str(tmp_path / "text.jsonl"), "--num-neurons", "20", "--scope", "layer"]
    expected = run_tool(tmp_path, *flags, student="long")["models"]["student"]
    shape = replace(describe_teacher(tmp_path / "teacher").shape, num_layers=1, teacher_layers=(1,))
    write_kept(tmp_path / "short", shape, {0: KeptRows(torch.arange(2), kept)})
    found = run_tool(tmp_path, *flags, student="short")["models"]["student"]
    assert expected["important"]["lm_loss"] != expected["unmasked"]["lm_loss"]
    for condition in ("unmasked", "important", "random"):
        assert found[condition]["lm_loss"] == pytest.approx(expected[condition]["lm_loss"], abs=1e-6)


def test_activations_may_be_measured_on_other_text(tmp_path: Path) -> None:
    write_pair(tmp_path)
    tiny_data.write_jsonl(tmp_path / "prompts.jsonl", tiny_data.make_texts(3))
    text = str(tmp_path / "text.jsonl")
    first = run_tool(tmp_path, "--input", text)
    other = run_tool(tmp_path, "--input", text, "--prompts", str(tmp_path / "prompts.jsonl"))
    assert first["important"] != other["important"]
    assert first["models"]["teacher"]["unmasked"] == other["models"]["teacher"]["unmasked"]


def test_the_plot_is_a_png_and_matplotlib_is_optional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    write_pair(tmp_path)
    flags = ["--input", str(tmp_path / "text.jsonl"), "--plot", str(tmp_path / "plots" / "masking.png")]
    run_tool(tmp_path, *flags)
    assert (tmp_path / "plots" / "masking.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = refused(capsys, "--teacher", tmp_path / "teacher", "--student", tmp_path / "student", *flags)
    assert "pip install matplotlib" in said


def test_models_without_common_neurons_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path)
    write_llama(tmp_path / "deeper", num_layers=3)
    flags = ("--teacher", tmp_path / "teacher", "--student", tmp_path / "deeper", "--input", tmp_path / "text.jsonl")
    said = refused(capsys, *flags)
    assert "has 2 layers of 80 FFN neurons" in said and "has 3 layers" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "either --items"),
        (["--input", "t", "--items", "i"], "either --items"),
        (["--input", "{}/text.jsonl", "--num-seeds", "0"], "--num-seeds 0"),
        (["--input", "{}/text.jsonl", "--num-neurons", "81"], "--num-neurons 81"),
        (["--items", "{}/absent.jsonl"], "absent.jsonl"),
    ],
)
def test_errors_say_what_to_do(
    tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(tmp_path)
    flags = [flag.format(tmp_path) for flag in flags]
    assert words in refused(capsys, "--teacher", tmp_path / "teacher", "--student", tmp_path / "student", *flags)
