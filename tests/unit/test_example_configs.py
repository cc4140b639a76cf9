"""examples/configs: each file is a whole run but for its paths, and passes the dry run of its machines."""

from pathlib import Path

import pytest
import yaml

from megatron_lrc.commands.main import main
from megatron_lrc.config import PRESETS, SETTINGS, load_yaml
from megatron_lrc.train import dry_run
from tiny_data import write_dataset

CONFIGS = Path(__file__).parents[2] / "examples/configs"
#: File -> the teacher that it names, and what its dry run is for.
RUNS = {
    "laptop.yaml": ("SmolLM2-135M-Instruct", "1", "TP 1 x PP 1 x DP 1 on 1 GPUs; 4 micro-batches of 1 x 256 tokens"),
    "one_node.yaml": ("Llama-3.2-3B-Instruct", "8", "TP 1 x PP 1 x DP 8 on 8 GPUs; 1 micro-batches of 3 x 2048 tokens"),
    "eight_nodes.yaml": (
        "Qwen2.5-7B-Instruct",
        "64",
        "TP 2 with sequence parallel x PP 1 x DP 32 on 64 GPUs; 4 micro-batches of 2 x 2048 tokens",
    ),
}


def test_every_file_is_tested():
    assert {path.name for path in CONFIGS.iterdir()} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_file_passes_the_dry_run_of_its_machines(name, full_size_teachers, tmp_path, capsys, monkeypatch):
    """With room for its checkpoints, whatever this machine has."""
    monkeypatch.setattr(dry_run, "free_space", lambda run: 1e13)
    teacher, gpus, layout = RUNS[name]
    data = write_dataset(tmp_path / "text", [[number % 64 + 100 for number in range(2100)]] * 200)
    paths = ["--teacher", str(full_size_teachers / teacher), "--data-path", data]
    flags = ["--config", str(CONFIGS / name), *paths, "--split", "90,10,0", "--save", str(tmp_path / "run")]
    code = main(["train", *flags, "--dry-run", gpus])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert layout in out and "dry run: every check passed" in out


def test_the_first_run_is_the_recommended_one():
    settings = load_yaml(CONFIGS / "laptop.yaml").to_dict()
    for name, value in PRESETS["recommended"].items():
        assert settings[SETTINGS[name].section][name] == value, name


@pytest.mark.parametrize("name", RUNS)
def test_a_file_explains_itself(name):
    """It says how it is started and for which teacher; every section is one of the settings'."""
    text = (CONFIGS / name).read_text()
    teacher = RUNS[name][0]
    assert teacher in text.splitlines()[0] and f"--config examples/configs/{name}" in text
    assert all(isinstance(section, dict) for section in yaml.safe_load(text).values())
