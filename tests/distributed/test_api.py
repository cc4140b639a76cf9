"""The public interface of the package from Python, and the example that uses it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from megatron_lrc import api
from ranks import run_ranks

ROOT = Path(__file__).parents[2]


def test_settings_are_those_of_the_flags(tiny_llama):
    config = api.configure(
        preset=["reference", "recommended"],
        teacher=tiny_llama(),
        student_hidden_size=24,
        data_path=["a", "b"],
        train_iters=3,
        bf16=True,
        untie_embeddings_and_output_weights=False,
        init="random",
        student_norm_epsilon=None,
    )
    assert (config.model.student_hidden_size, config.training.bf16) == (24, True)
    assert config.model.untie_embeddings_and_output_weights is False and config.data.data_path == ["a", "b"]
    assert config.loss.alpha == 0.03 and config.projection.init == "random"
    assert config.model.student_norm_epsilon == 1e-5  # of the preset: None leaves it


def test_all_that_is_wrong_is_said_at_once(tiny_llama):
    with pytest.raises(api.ConfigError, match="unknown flag --student-hiden-size; did you mean --student-hidden-size"):
        api.configure(teacher=tiny_llama(), student_hiden_size=24)
    with pytest.raises(api.ConfigError) as caught:
        api.configure(teacher="/nowhere", student_hidden_size=24, train_iters=1, data_path=["a"], lr=-1)
    assert [line.split()[0] for line in str(caught.value).splitlines()] == ["--lr", "--teacher"]


def use(teacher: str, data: str, folder: str) -> dict:
    """On one rank: a run, one that goes on, the untrained student, and what signals do afterwards."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    settings = {"teacher": teacher, "student_hidden_size": 24, "data_path": [data], "split": "90,10,0"}
    settings |= {"seq_length": 16, "global_batch_size": 8, "micro_batch_size": 4, "lr_decay_iters": 4, "lr": 1e-3}
    settings |= {"eval_iters": 1, "log_interval": 1, "init": "orthogonal"}
    config = api.configure(**settings, train_iters=2, save=Path(folder) / "run")
    composed = api.compose(config)
    first = api.train(config)
    again = api.train(api.configure(**settings, train_iters=3, save=Path(folder) / "run", load="auto"))
    unsaved = api.train(api.configure(**settings, train_iters=1))
    api.export(first, Path(folder) / "hf")
    with pytest.raises(api.ConfigError, match="was not saved"):
        api.export(unsaved, Path(folder) / "other")
    with pytest.raises(api.ConfigError):
        api.export(first, Path(folder) / "hf")
    untrained = api.train(api.configure(**settings, train_iters=0, save=Path(folder) / "untrained"))
    start = AutoModelForCausalLM.from_pretrained(api.export(untrained, Path(folder) / "start")).state_dict()
    return {
        "steps": [[record["step"] for record in run.records] for run in (first, again, unsaved)],
        "validations": [[record["step"] for record in run.validations] for run in (first, again, unsaved)],
        "finished": [run.is_finished for run in (first, again, unsaved)],
        "directory": unsaved.directory,
        "is_start": all(tensor.equal(start[name]) for name, tensor in composed.state_dict().items()),
        "signals": before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "left": sorted(path.name for path in Path(folder).iterdir()),
    }


@pytest.mark.distributed
@pytest.mark.slow  # six runs
def test_several_runs_in_one_process(tiny_llama, tiny_text, tmp_path):
    (found,) = run_ranks(1, use, tiny_llama(), tiny_text, str(tmp_path))
    assert found == {
        "steps": [[1, 2], [1, 2, 3], []],
        "validations": [[0, 2], [0, 2, 3], []],
        "finished": [True, True, True],
        "directory": None,
        "is_start": True,
        "signals": True,
        "left": ["hf", "run", "start", "untrained"],
    }


@pytest.mark.distributed
def test_the_example_runs(tiny_llama, tiny_text, tmp_path):
    command = [sys.executable, ROOT / "examples/from_python.py", tiny_llama(), tiny_text, "24", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for words in ("\ncomposed: ", "\nheld-out LM loss ", "\nexported: "):
        assert words in done.stdout, done.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out/student").config.hidden_size == 24
