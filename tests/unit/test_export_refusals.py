"""An export that must not be kept leaves nothing, and replaces nothing."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_teachers import write_llama
from megatron_lrc.config import ConfigError
from megatron_lrc.hf.export import export_model
from megatron_lrc.hf.families import TeacherDescription, Weight, describe_teacher
from megatron_lrc.hf.forward import fixed_tokens
from megatron_lrc.hf.student_weights import StudentWeights
from megatron_lrc.hf.teacher import TeacherReader
from students import State, export_student, random_student


@pytest.fixture
def teacher(tmp_path: Path) -> TeacherDescription:
    write_llama(tmp_path / "teacher")
    return describe_teacher(tmp_path / "teacher")


def refuse(tmp_path: Path, teacher: TeacherDescription, state: State, **changes: object) -> str:
    """The message of an export that must fail; nothing may be left beside the teacher."""
    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = {"student_hidden_size": 28, "output": tmp_path / "student"} | changes
    with pytest.raises(ConfigError) as caught:
        export_student(teacher=teacher, projections=state[0], norms=state[1], **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_diverged_student_is_not_kept(tmp_path: Path, teacher: TeacherDescription) -> None:
    state = random_student(teacher, 28, has_lm_head=True)
    state[0]["layers.1.down"][3, 3] = float("nan")
    message = refuse(tmp_path, teacher, state)
    assert "model.layers.1.mlp.down_proj.weight holds values that are not finite, so the run has diverged" in message
    export_student(
        teacher=teacher,
        projections=state[0],
        norms=state[1],
        student_hidden_size=28,
        output=tmp_path / "student",
        verify=False,
    )
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_a_value_that_only_one_token_uses_is_looked_at_too(tmp_path: Path, teacher: TeacherDescription) -> None:
    """The self-check computes with a few tokens, and this one is not among them."""
    reader, vocab_size = TeacherReader(teacher), teacher.shape.vocab_size
    unused = min(set(range(vocab_size)) - set(fixed_tokens(vocab_size).flatten().tolist()))

    def weight_of(weight: Weight) -> Tensor:
        tensor = reader.weight(weight)
        if weight.key == "embed":
            tensor[unused, 7] = float("inf")
        return tensor

    with pytest.raises(ConfigError, match=r"model.embed_tokens.weight holds values that are not finite"):
        export_model(
            base=teacher, shape=teacher.shape, weight_of=weight_of, dtype=torch.float32, output=tmp_path / "new"
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verify", [True, False])
def test_values_that_float16_cannot_hold_are_refused_whether_or_not_it_is_verified(
    tmp_path: Path, teacher: TeacherDescription, verify: bool
) -> None:
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    norms["final"][5] = -70000.0
    message = refuse(tmp_path, teacher, (projections, norms), dtype=torch.float16, verify=verify)
    assert "model.norm.weight has values of up to 70000, and --dtype float16 holds 65504 at most" in message
    norms["final"] *= 1e-13
    message = refuse(tmp_path, teacher, (projections, norms), dtype=torch.float16, verify=verify)
    assert "model.norm.weight has values of up to" in message
    assert "only, and --dtype float16 holds 5.96e-08 at least: all of them would be written as zero" in message
    norms["final"][5] = -65510.0  # which rounds to the largest one
    export_student(
        teacher=teacher,
        projections=projections,
        norms=norms,
        student_hidden_size=28,
        output=tmp_path / "student",
        dtype=torch.float16,
        verify=False,
    )


def test_a_student_whose_activations_overflow_float16_is_not_kept_as_one(
    tmp_path: Path, teacher: TeacherDescription
) -> None:
    """Its weights fit into float16, and float32 arithmetic shows nothing."""
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    norms["layers.1.post"] = norms["layers.1.post"] * 3000.0
    message = refuse(tmp_path, teacher, (projections, norms), dtype=torch.float16)
    assert "computed in float16 its logits are not finite" in message


def test_student_of_another_teacher_is_refused(tmp_path: Path, teacher: TeacherDescription) -> None:
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    without = {name: tensor for name, tensor in projections.items() if name != "layers.1.o"}
    assert "projections" in (message := refuse(tmp_path, teacher, (without, norms))) and "layers.1.o" in message
    message = refuse(tmp_path, teacher, (projections, norms | {"layers.2.post": norms["final"]}))
    assert "norm gains" in message and "layers.2.post" in message
    narrow = projections | {"layers.0.v": projections["layers.0.v"][:, :27]}
    message = refuse(tmp_path, teacher, (narrow, norms))
    assert "layers.0.v has shape [48, 27]" in message and "[48, 28] is expected" in message


def test_tied_student_of_an_untied_teacher_is_refused(tmp_path: Path, teacher: TeacherDescription) -> None:
    message = refuse(tmp_path, teacher, random_student(teacher, 28, has_lm_head=False))
    assert "--untie-embeddings-and-output-weights" in message


def test_damaged_teacher_leaves_no_output(tmp_path: Path, teacher: TeacherDescription) -> None:
    path = teacher.directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert "not a complete safetensors file" in refuse(tmp_path, teacher, random_student(teacher, 28, has_lm_head=True))


def test_only_force_replaces_an_earlier_export_and_only_by_a_complete_one(
    tmp_path: Path, teacher: TeacherDescription
) -> None:
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    output = tmp_path / "student"
    output.mkdir()  # empty: nothing to lose
    export_student(teacher=teacher, projections=projections, norms=norms, student_hidden_size=28, output=output)
    first = load_file(output / "model.safetensors")
    assert "--force" in refuse(tmp_path, teacher, (projections, norms))

    broken = projections | {"embed": projections["embed"] * float("nan")}
    refuse(tmp_path, teacher, (broken, norms), force=True)
    assert torch.equal(load_file(output / "model.safetensors")["lm_head.weight"], first["lm_head.weight"])

    doubled = projections | {"lm_head": projections["lm_head"] * 2}
    export_student(teacher=teacher, projections=doubled, norms=norms, student_hidden_size=28, output=output, force=True)
    assert torch.equal(load_file(output / "model.safetensors")["lm_head.weight"], first["lm_head.weight"] * 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


def test_force_never_replaces_what_is_no_export(tmp_path: Path, teacher: TeacherDescription) -> None:
    state = random_student(teacher, 28, has_lm_head=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    for output in (tmp_path / "run", teacher.directory, tmp_path):
        assert "--force does not replace it" in refuse(tmp_path, teacher, state, output=output, force=True)
    (tmp_path / "file").write_text("")
    assert "is a file" in refuse(tmp_path, teacher, state, output=tmp_path / "file", force=True)


def own_file(output: Path) -> None:
    (output / "notes.txt").write_text("mine")


def own_folder(output: Path) -> None:
    (output / "results").mkdir()


def own_weights(output: Path) -> None:
    """Trained further, in the same place: a file of the same name and size."""
    content = bytearray((output / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (output / "model.safetensors").write_bytes(content)


def own_link(output: Path) -> None:
    (output / "README.md").rename(output.parent / "card.md")
    (output / "README.md").symlink_to(output.parent / "card.md")


@pytest.mark.parametrize(
    "change, name",
    [
        (own_file, "notes.txt"),
        (own_folder, "results"),
        (own_weights, "model.safetensors"),
        (own_link, "README.md"),
    ],
)
def test_force_never_replaces_what_an_export_has_not_written(tmp_path: Path, teacher, change, name: str) -> None:
    state, output = random_student(teacher, 28, has_lm_head=True), tmp_path / "student"
    arguments = {"student_hidden_size": 28, "verify": False, "model_card": "# A student"}
    export_student(teacher=teacher, projections=state[0], norms=state[1], output=output, **arguments)
    change(output)
    before = {path: path.is_file() and path.read_bytes() for path in output.rglob("*")}
    assert f"holds {name}, which no export has written" in refuse(tmp_path, teacher, state, force=True, **arguments)
    assert {path: path.is_file() and path.read_bytes() for path in output.rglob("*")} == before


def test_force_never_replaces_a_model_that_is_no_export(tmp_path: Path, teacher: TeacherDescription) -> None:
    """A user's own, with the very files that an export has."""
    shutil.copytree(teacher.directory, tmp_path / "own")
    state = random_student(teacher, 28, has_lm_head=True)
    assert "is not an earlier export" in refuse(tmp_path, teacher, state, output=tmp_path / "own", force=True)


def test_two_exports_to_one_place_do_not_mix(tmp_path: Path, teacher: TeacherDescription) -> None:
    """The second is refused while the first writes; one that began before the first was done does not replace it."""
    state, output, refusals = random_student(teacher, 28, has_lm_head=True), tmp_path / "student", []
    arguments = {"student_hidden_size": 28, "verify": False, "output": output}

    def second(_: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            export_student(teacher=teacher, projections=state[0], norms=state[1], **arguments)
        refusals.append(str(caught.value))

    shape = replace(teacher.shape, hidden_size=28)
    weights = StudentWeights(teacher, shape, projections=state[0], norms=state[1])
    how = {"dtype": torch.float32, "output": output, "verify": False}
    export_model(base=teacher, shape=shape, weight_of=weights, write_extra=second, **how)
    assert refusals and f"--output {output} is being written by another process" in refusals[0]
    assert (output / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


def test_what_has_come_to_the_place_meanwhile_is_not_replaced(tmp_path: Path, teacher: TeacherDescription) -> None:
    state, output = random_student(teacher, 28, has_lm_head=True), tmp_path / "student"
    shape = replace(teacher.shape, hidden_size=28)
    weights = StudentWeights(teacher, shape, projections=state[0], norms=state[1])

    def put_a_file_there(_: Path) -> None:
        output.mkdir()
        (output / "mine").write_text("kept")

    how = {"dtype": torch.float32, "output": output, "verify": False}
    with pytest.raises(ConfigError, match="is not empty"):
        export_model(base=teacher, shape=shape, weight_of=weights, write_extra=put_a_file_there, **how)
    assert (output / "mine").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]
