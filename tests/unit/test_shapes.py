"""tools/plan.py shape finds the largest students within a target, counts them as transformers does, and scores them."""

import csv
import inspect
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hf_teachers import write_llama, write_qwen2, write_qwen3
from megatron_lrc.commands.untrained_scores import score
from megatron_lrc.config import Config, ConfigError, ModelShape, parse_config, student_layers
from megatron_lrc.estimate.published_teachers import TEACHER_SHAPES
from megatron_lrc.estimate.shapes import AXES, Candidate, Cost, Serving, Target, find_shapes
from megatron_lrc.hf.families import describe_teacher
from tools_path import tool_main

plan_main = tool_main("plan")
TEACHER = TEACHER_SHAPES["Qwen2.5-7B-Instruct"]
CONTEXT = 31


def config_with(**model: object) -> Config:
    """Of hidden sizes and layers, unless another size is left open with None."""
    config = Config()
    kept = {"student_num_query_groups": TEACHER.num_query_groups, "student_ffn_hidden_size": TEACHER.ffn_hidden_size}
    for name, value in (kept | model).items():
        setattr(config.model, name, value)
    return config


def shapes_within(most: float, measure: str = "parameters", top: int = 1000, **model: object) -> list[Candidate]:
    target = Target(f"--most {most:g}", measure, most)
    return find_shapes(config_with(**model), TEACHER, [target], Serving(), divisor=256, top=top)


@pytest.mark.parametrize(("write", "is_tied"), [(write_llama, True), (write_qwen2, False), (write_qwen3, True)])
def test_a_shape_costs_what_transformers_holds_reads_and_multiplies(tmp_path, write, is_tied):
    model = write(tmp_path, is_tied=is_tied).eval()
    shape, sequences = describe_teacher(tmp_path).shape, 4
    cost = Cost.of(shape, Serving(context_length=CONTEXT + 1, batch_size=sequences, bytes_per_number=4))
    assert cost.parameters == model.num_parameters()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    tokens = torch.arange(CONTEXT + 1)[None]
    argument = (
        "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    )  # the older name
    with torch.no_grad():
        cache = model(tokens[:, :CONTEXT], use_cache=True).past_key_values
        held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, CONTEXT:], **{argument: cache}, use_cache=True)
    assert cost.kv_cache_bytes * CONTEXT == held
    assert counter.get_total_flops() - cost.flops == pytest.approx(0, abs=2 * shape.head_dim), "RoPE's angles at most"
    weights = sum(parameter.nbytes for parameter in model.parameters())
    cached = cost.kv_cache_bytes * (CONTEXT + 1)
    assert cost.memory_bytes == weights + sequences * cached
    looked_up = 0 if is_tied else 4 * shape.vocab_size * shape.hidden_size
    assert cost.decode_bytes == (weights - looked_up) / sequences + cached


@pytest.mark.parametrize(
    ("measure", "most"), [("parameters", 3e9), ("memory_bytes", 4e9), ("decode_bytes", 6e9), ("kv_cache_bytes", 30000)]
)
def test_nothing_larger_fits_and_nothing_as_large_is_missing(measure, most):
    """Held against every pair of sizes, compared with every other one."""
    found = {tuple(candidate.sizes.values()) for candidate in shapes_within(most, measure)}
    grid = itertools.product(range(256, 3585, 256), [1, 4, 7, 10, 13, 16, 19, 22, 25, 28])
    fitting = [sizes for sizes in grid if getattr(Cost.of(candidate_shape(*sizes), Serving()), measure) <= most]
    largest = {
        sizes
        for sizes in fitting
        if not any(other != sizes and all(map(int.__ge__, other, sizes)) for other in fitting)
    }
    assert found == largest and len(found) >= 1


def candidate_shape(hidden: int, layers: int) -> ModelShape:
    return replace(TEACHER, hidden_size=hidden, num_layers=layers)


def test_of_many_those_are_shown_that_cut_no_size_much():
    """The widest first."""
    every, few = shapes_within(3e9), shapes_within(3e9, top=3)
    kept = sorted((least_kept(found) for found in every), reverse=True)
    assert len(every) > 5 and sorted((least_kept(found) for found in few), reverse=True) == kept[:3]
    widths = [candidate.student.hidden_size for candidate in every]
    assert widths == sorted(widths, reverse=True)


def least_kept(found: Candidate) -> float:
    return min(found.student.hidden_size / TEACHER.hidden_size, found.student.num_layers / TEACHER.num_layers)


def test_groups_and_neurons_are_searched_too():
    open_sizes = {"student_num_query_groups": None, "student_ffn_hidden_size": None}
    found = shapes_within(3e9, **open_sizes)
    assert {candidate.student.num_query_groups for candidate in found} == {1, 2, 3, 4}
    widths = {candidate.student.ffn_hidden_size for candidate in found}
    assert len(widths) == 8 and all(width % 256 == 0 for width in widths)
    (best,) = shapes_within(3e9, top=1, **open_sizes)
    assert least_kept(best) > max(map(least_kept, shapes_within(3e9)))
    settings = ["--student-hidden-size", "--student-num-layers", "--student-num-query-groups"]
    assert best.flags()[::2] == [*settings, "--student-ffn-hidden-size"]


def test_what_the_flags_give_is_kept_and_all_targets_hold():
    (found,) = shapes_within(3e9, student_num_layers=20)
    assert found.student.num_layers == 20 and found.flags() == ["--student-hidden-size", "1792"]
    (named,) = shapes_within(3e9, student_layers=["0-18", "27"])
    assert named.cost == found.cost and named.student.teacher_layers == (*range(19), 27)
    both = [Target("--a", "parameters", 3e9), Target("--b", "kv_cache_bytes", 30000)]
    shapes = find_shapes(config_with(), TEACHER, both, Serving(), divisor=256, top=99)
    assert max(found.student.num_layers for found in shapes) == 13 and shapes
    assert all(found.cost.parameters <= 3e9 and found.cost.kv_cache_bytes <= 30000 for found in shapes)


def test_a_target_that_nothing_or_everything_meets_is_refused_in_a_sentence():
    with pytest.raises(
        ConfigError, match=r"--most 1e\+06 is too little: .*\(hidden 256, layers 1, .* takes 94.5 times"
    ):
        shapes_within(1e6)
    with pytest.raises(ConfigError, match=r"--most 1e\+10 holds every shape .*\(hidden 3584, layers 28, .*: 7.62B"):
        shapes_within(1e10)


def test_the_tool_prints_writes_and_draws_them(tmp_path, capsys):
    """Of a published run it needs no teacher, and the preset's own width is none of the user's."""
    pytest.importorskip("matplotlib")
    flags = ["--preset", "lrc-1.5b", "--target-params", "1.2B", "--hidden-size-divisor", "256"]
    flags += ["--csv", str(tmp_path / "out/shapes.csv")]
    assert plan_main(["shape", *flags, "--plot", str(tmp_path / "out/shapes.png"), "--top", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["hidden", "layers", "KV", "groups", "FFN"] and len(lines) == 6
    assert lines[1].split()[:4] == ["teacher", "3072", "28", "8"]
    assert plan_main(["shape", *flags, "--top", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [line.split()[1:5] for line in lines[2:]] == [[str(row[axis.field]) for axis in AXES] for row in rows]
    assert all(1.0e9 < row["parameters"] <= 1.2e9 for row in rows) and len(rows) == 4
    with (tmp_path / "out/shapes.csv").open() as file:
        written = list(csv.DictReader(file))
    assert written == [{name: str(value) for name, value in row.items()} for row in rows]
    assert (tmp_path / "out/shapes.png").read_bytes().startswith(b"\x89PNG")
    others = ["--student-num-query-groups", "8", "--student-ffn-hidden-size", "8192"]
    assert plan_main(["shape", *flags, "--student-hidden-size", "1536", *others]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_each_shape_names_the_layers_that_matter_most(tiny_llama, tiny_text, capsys):
    run = ["--teacher", tiny_llama(num_layers=4), "--data-path", tiny_text, "--seq-length", "32"]
    run += ["--calibration-tokens", "64", "--student-hidden-size", "24"]
    run += ["--student-num-query-groups", "2", "--student-ffn-hidden-size", "80"]
    ranked = []
    for count in ("1", "2", "3"):
        assert plan_main(["layers", *run, "--layer-importance", "loss", "--student-num-layers", count, "--json"]) == 0
        ranked.append(json.loads(capsys.readouterr().out)["loss"]["kept"])
    size = parameters_of(tiny_llama(num_layers=4), hidden=24, layers=3)
    assert plan_main(["shape", *run, "--layer-importance", "loss", "--target-params", str(size), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    named = parse_config(row["flags"].split())
    assert student_layers(named.model, 4) == tuple(ranked[2]) and named.model.student_num_layers == 3
    assert set(ranked[0]) < set(ranked[1]) < set(ranked[2])


def parameters_of(teacher: str, hidden: int, layers: int) -> int:
    shape = replace(describe_teacher(teacher).shape, hidden_size=hidden, num_layers=layers)
    return Cost.of(shape, Serving()).parameters


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "Give a target: --target-params, --target-memory, --target-decode-bytes"),
        (["--target-params", "many"], "--target-params many is no number above 0"),
        (["--target-memory", "-1"], "--target-memory -1.0 is no number above 0"),
        (["--target-params", "1K"], "--target-params 1K is too little"),
        (["--target-params", "1.2B", "--data-path", "unused", "--layer-importance", "loss"], "--teacher is missing"),
        (["--target-params", "1.2B", "--score"], "--score runs the teacher. Give --teacher DIR"),
        (
            ["--target-params", "1.2B", "--student-num-layers", "99"],
            "--student-num-layers 99 is above the teacher's 28",
        ),
        (["--target-params", "1.2B", "--method", "sheared"], "--method sheared: its memory and time"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_a_sentence(flags, said, capsys):
    assert plan_main(["shape", "--preset", "lrc-1.5b", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"plan.py shape: {said}") or error.startswith(f"plan.py: {said}")
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--score-processes", "2", "--pipeline-model-parallel-size", "2"]])
def test_scores_are_those_of_a_run_before_its_first_step(more, tiny_llama, tiny_text, capsys):
    """By pca at full width with every layer a clone is its teacher, on two stages too."""
    run = ["--teacher", tiny_llama(), "--data-path", tiny_text, "--split", "50,50,0", "--init", "pca", *more]
    run += ["--calibration-tokens", "512", "--seq-length", "32", "--eval-iters", "2", "--student-hidden-size", "48"]
    run += ["--student-num-query-groups", "2", "--student-ffn-hidden-size", "80"]
    assert plan_main(["shape", *run, "--target-params", "1M", "--score", "--json", "--student-num-layers", "2"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["lm_loss"] == pytest.approx(row["teacher_lm_loss"], abs=1e-4) and row["teacher_kl"] < 1e-4
    assert row["top1_agreement"] > 0.99 and math.isfinite(row["lm_loss"])


def test_a_score_that_fails_says_why_in_a_line():
    with pytest.raises(ConfigError, match=r"--score failed with --no-such-flag: .*unknown flag --no-such-flag"):
        score(["--no-such-flag"], processes=1)
