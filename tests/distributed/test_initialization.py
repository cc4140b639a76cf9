"""How the projections start: each --init is the same on every layout, and does what its closed form or fit says."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_teachers import write_granite, write_llama
from megatron_lrc.checkpoints.saved_student import open_checkpoint
from megatron_lrc.clone.kept_rows import KeptRows
from megatron_lrc.clone.ridge import RIDGE
from megatron_lrc.config import MATRICES, Config
from megatron_lrc.data.datasets import build_datasets
from ranks import run_ranks
from runs import assert_same_parameters, make_config, on_layout, records, train
from tools_path import convert_to_hf

WIDTH, HEAD_DIM, HEADS_IN_GROUP = 48, 16, 2  # the tiny teacher's
ALL_ROWS = KeptRows(torch.arange(2), torch.arange(80))
INITS = ["orthogonal", "channel", "pca", "ridge"]
#: What `make test` holds on every layout; the others: `make test-slow`.
QUICK = ["ridge"]
LAYOUTS = {
    "TP2+SP": (2, {"tp": 2}),
    "PP2": (2, {"pp": 2}),
    "PP2 x 2": (2, {"pp": 2, "chunks": 2}),
    "CP2": (2, {"cp": 2}),
    "DP2": (2, {}),
}


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    write_llama(tmp_path / "teacher", num_layers=4)
    return str(tmp_path / "teacher")


def start_of(config: Config, init: str) -> Config:
    """A run without steps."""
    projection = replace(config.projection, init=init)
    if projection.is_calibrated:
        projection.calibration_tokens = 512
    return replace(config, projection=projection)


def projections_of(run: Path) -> dict[str, Tensor]:
    return {name.removeprefix("projections."): matrix for name, matrix in open_checkpoint(str(run)).projections.items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "init", [pytest.param(init, marks=[] if init in QUICK else [pytest.mark.slow]) for init in INITS]
)
def test_a_start_is_the_same_every_time_and_alike_on_every_layout(teacher, tiny_text, tmp_path, init):
    make = partial(make_config, teacher, tiny_text, steps=0)
    train(start_of(make(tmp_path / "one"), init))
    train(start_of(make(tmp_path / "again"), init))
    assert_same_parameters(tmp_path / "again", tmp_path / "one")
    expected = projections_of(tmp_path / "one")
    (losses,) = records(tmp_path / "one", "validation.jsonl")
    for name, (ranks, layout) in LAYOUTS.items():
        train(on_layout(start_of(make(tmp_path / name), init), **layout), ranks)
        found = projections_of(tmp_path / name)
        assert set(found) == set(expected)
        for key, matrix in expected.items():
            # A principal direction may turn round, and mix with one of about its eigenvalue: not so what they span.
            got, wanted = found[key], matrix
            if init in ("pca", "ridge"):
                got, wanted = got @ got.t(), wanted @ wanted.t()
            assert (got - wanted).abs().max() < 1e-3 * wanted.abs().max(), (name, key)
        (others,) = records(tmp_path / name, "validation.jsonl")
        for key in ("lm_loss", "kl_loss", "clone_loss", "teacher_kl"):
            assert others[key] == pytest.approx(losses[key], rel=1e-4), (name, key)
        assert others["top1_agreement"] == pytest.approx(losses["top1_agreement"], abs=0.01)  # some are near ties


@pytest.mark.slow
@pytest.mark.distributed
def test_in_bf16_ridge_is_alike_on_every_layout(teacher, tiny_text, tmp_path):
    losses = {}
    for name, (ranks, layout) in {"one": (1, {}), "TP2+SP": (2, {"tp": 2}), "PP2": (2, {"pp": 2})}.items():
        config = on_layout(start_of(make_config(teacher, tiny_text, tmp_path / name, steps=0), "ridge"), **layout)
        config.training.bf16 = True
        train(config, ranks)
        (losses[name],) = records(tmp_path / name, "validation.jsonl")
    for name in ("TP2+SP", "PP2"):
        for key in ("lm_loss", "kl_loss", "clone_loss"):
            assert losses[name][key] == pytest.approx(losses["one"][key], rel=2e-2), (name, key)


@pytest.mark.distributed
@pytest.mark.parametrize("init", INITS)
def test_at_full_width_each_start_is_the_teacher(teacher, tiny_text, tmp_path, init):
    config = start_of(make_config(teacher, tiny_text, tmp_path / "run", steps=0), init)
    config.model.student_hidden_size = WIDTH
    train(config)
    (validation,) = records(tmp_path / "run", "validation.jsonl")
    assert validation["kl_loss"] < 1e-5 and validation["clone_loss"] < 1e-5 * abs(validation["lm_loss"])


@pytest.mark.distributed
def test_channels_are_those_with_the_largest_activations(teacher, tiny_text, tmp_path):
    """A teacher whose layers give nothing has its embedding as the residual stream; two channels of it are loud."""
    loud = {7: 100.0, 30: 50.0}
    model = LlamaForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for channel, factor in loud.items():
            model.model.embed_tokens.weight[:, channel] *= factor
    model.save_pretrained(teacher)
    config = start_of(make_config(teacher, tiny_text, tmp_path / "run", steps=0), "channel")
    config.model.student_hidden_size = 2
    train(config)
    chosen = torch.zeros(WIDTH, 2)
    chosen[list(loud), [0, 1]] = 1.0
    found = projections_of(tmp_path / "run")
    assert torch.equal(found["embed"], chosen)
    assert torch.equal(found["layers.1.q"], chosen)
    gain = open_checkpoint(str(tmp_path / "run")).norms["layers.1.input"]
    assert torch.allclose(gain, (WIDTH / 2) ** 0.5 * model.model.layers[1].input_layernorm.weight[list(loud)])


def inputs_of_norms(config: Config, kept: dict[int, KeptRows]) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """By transformers, over the calibration tokens: norm -> ([n, D] that it is given, what of that comes from what is
    not kept); epsilon. kept: by the teacher's layer; those that are not there are missing whole."""
    data, _ = build_datasets(config)
    count = config.projection.calibration_tokens // config.training.seq_length
    tokens = torch.stack([data[index]["tokens"] for index in range(count)])
    model = AutoModelForCausalLM.from_pretrained(config.model.teacher).eval()
    found, missing = {}, torch.zeros(1)

    def note(name: str, module: torch.nn.Module, args: tuple) -> None:
        found[name] = args[0].flatten(0, 1).double(), (torch.zeros_like(args[0]) + missing).flatten(0, 1).double()

    def add(added: Tensor) -> None:
        nonlocal missing
        missing = missing + added

    def without(linear: torch.nn.Linear, columns: Tensor, args: tuple) -> Tensor:
        dropped = args[0].clone()
        dropped[..., columns] = 0
        return linear(dropped) * getattr(model.config, "residual_multiplier", 1.0)

    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_pre_hook(partial(note, f"layers.{index}.input"))
        layer.post_attention_layernorm.register_forward_pre_hook(partial(note, f"layers.{index}.post"))
        if index not in kept:
            layer.register_forward_hook(lambda module, args, output: add(output - args[0]))
            continue
        columns = {"groups": HEADS_IN_GROUP * HEAD_DIM, "neurons": 1}
        for (unit, width), linear in zip(columns.items(), (layer.self_attn.o_proj, layer.mlp.down_proj), strict=True):
            features = (kept[index].of(unit)[:, None] * width + torch.arange(width)).flatten()
            plain = torch.nn.Linear(*linear.weight.T.shape, bias=False)
            plain.weight = linear.weight
            linear.register_forward_hook(
                lambda module, args, output, plain=plain, features=features: add(without(plain, features, args))
            )
    model.model.norm.register_forward_pre_hook(partial(note, "final"))
    with torch.no_grad():
        model(tokens)
    return found, model.config.rms_norm_eps


def gains_of(teacher: str) -> dict[str, Tensor]:
    """Norm -> its gain [D]."""
    model = AutoModelForCausalLM.from_pretrained(teacher).model
    gains = {"final": model.norm.weight}
    for index, layer in enumerate(model.layers):
        gains[f"layers.{index}.input"] = layer.input_layernorm.weight
        gains[f"layers.{index}.post"] = layer.post_attention_layernorm.weight
    return {name: gain.detach().double() for name, gain in gains.items()}


def cut(name: str, weight: Tensor, channels: Tensor) -> Tensor:
    """A tensor of a Llama, named by transformers, without the other channels of the residual stream."""
    if "norm" in name:
        return (WIDTH / len(channels)) ** 0.5 * weight[channels]
    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
    return weight[channels] if writes else weight[:, channels]


@pytest.mark.distributed
def test_minitron_starts_as_the_teacher_cut_to_its_most_active_channels(teacher, tiny_text, tmp_path):
    """And trains all of it from the first step on. The rate is one that moves nothing."""
    config = start_of(make_config(teacher, tiny_text, tmp_path / "run", steps=1), "channel")
    config.projection.open_after, config.projection.open_matrices = 0, "all"
    config.loss.alpha, config.loss.lm_weight, config.loss.kl_temperature = 0, 0, 1
    config.optimizer.lr = 1e-9
    train(config)
    ((read, _),) = run_ranks(1, inputs_of_norms, config.resolved(1), dict.fromkeys(range(4), ALL_ROWS))
    activity = sum(torch.nn.functional.rms_norm(rows, (WIDTH,)).square().sum(0) for rows, _ in read.values())
    channels = activity.argsort(descending=True)[:24]
    assert convert_to_hf(["--load", str(tmp_path / "run"), "--output", str(tmp_path / "student")]) == 0
    models = (LlamaForCausalLM.from_pretrained(path).state_dict() for path in (teacher, tmp_path / "student"))
    expected, found = models
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert torch.allclose(found[name], cut(name, weight, channels), rtol=1e-5, atol=1e-7), name
    saved = open_checkpoint(str(tmp_path / "run"))
    assert saved.state.changed_at == 0 and not saved.projections
    assert "and all of them were trained" in (tmp_path / "student/README.md").read_text()
    (record,) = records(tmp_path / "run")
    assert record["loss"] == record["kl_loss"] > 0 and all(record["grad_norm_by_group"][group] for group in MATRICES)


PART = {"student_num_query_groups": 1, "student_ffn_hidden_size": 40}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("write", "kept", "part", "layout"),
    [
        (write_llama, (0, 1, 2, 3), {}, {}),
        (write_llama, (0, 1, 2, 3), {"student_ffn_hidden_size": 40}, {"tp": 2}),
        (write_llama, (0, 2, 3), PART, {"pp": 2}),
        pytest.param(write_granite, (0, 2, 3), PART, {}, marks=pytest.mark.slow),
    ],
)
def test_ridge_is_the_least_squares_fit_of_what_the_teacher_reads(tiny_text, tmp_path, write, kept, part, layout):
    """Against torch's solver, on rows for the tokens and rows for the ridge. A student without layer 1, or without some
    of the groups and neurons, reads a stream to which these have added nothing."""
    teacher = str(tmp_path / "teacher")
    write(Path(teacher), num_layers=4)
    config = start_of(make_config(teacher, tiny_text, tmp_path / "run", steps=0), "ridge")
    config.model.student_norm_epsilon = own_epsilon = 0.05
    config.model = replace(config.model, student_layers=[str(layer) for layer in kept], **part)
    train(on_layout(config, **layout), 2 if layout else 1)
    found = projections_of(tmp_path / "run")
    basis = found["embed"].double()
    assert torch.equal(found["embed"], found["layers.1.o"]) and torch.equal(found["embed"], found["layers.2.down"])
    saved = open_checkpoint(str(tmp_path / "run")).kept
    rows = {layer: saved.get(index, ALL_ROWS) for index, layer in enumerate(kept)}
    assert bool(part) == bool(saved)
    ((read, epsilon),) = run_ranks(1, inputs_of_norms, config.resolved(1), rows)
    width, gains = basis.shape[1], gains_of(teacher)
    for norm, sites in {"layers.1.input": "qkv", "layers.2.post": ["gate", "up"], "final": ["lm_head"]}.items():
        of_teacher = norm if norm == "final" else f"layers.{kept[int(norm[7])]}{norm[8:]}"
        (stream, missing), gain = read[of_teacher], gains[of_teacher]
        assert bool(part) == bool(missing.any())
        teacher_reads = torch.nn.functional.rms_norm(stream, (WIDTH,), gain, epsilon)
        student_reads = torch.nn.functional.rms_norm((stream - missing) @ basis, (width,), eps=own_epsilon)
        prior = (WIDTH / width) ** 0.5 * gain[:, None] * basis
        weight = (RIDGE * student_reads.square().sum(0).mean()).sqrt()
        inputs = torch.cat([student_reads, weight * torch.eye(width)])
        targets = torch.cat([teacher_reads, weight * prior.t()])
        expected = torch.linalg.lstsq(inputs, targets).solution.t()
        assert (expected - prior).abs().max() > 0.1 * prior.abs().max(), "nothing was fitted"
        for site in sites:
            got = found[site if norm == "final" else f"{norm.rpartition('.')[0]}.{site}"]
            assert (got - expected).abs().max() < 1e-4 * expected.abs().max(), (norm, site)


@pytest.mark.distributed
def test_ridge_starts_nearer_to_the_teacher_than_pca(teacher, tiny_text, tmp_path):
    """On text it has not seen."""
    losses = {}
    for init in ("pca", "ridge"):
        config = start_of(make_config(teacher, tiny_text, tmp_path / init, steps=0), init)
        config.projection.calibration_tokens = 2048
        train(config)
        (losses[init],) = records(tmp_path / init, "validation.jsonl")
    assert losses["ridge"]["kl_loss"] < 0.9 * losses["pca"]["kl_loss"]
    assert losses["ridge"]["clone_loss"] < 0.9 * losses["pca"]["clone_loss"]
