"""What ranks must have alike: every setting but the marked ones, and what lies at a path, wherever that is."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

import megatron_lrc
from checkpoints import write_run
from megatron_lrc.config import SETTINGS, Config, flag_of
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.mcore.distributed import Meeting, meet
from megatron_lrc.train import alike, rank_identity
from megatron_lrc.train.alike import check_alike
from megatron_lrc.train.rank_identity import describe_rank, describe_settings
from megatron_lrc.train.start_checks import check
from runs import make_config
from students import random_student

#: Settings that are texts, but no paths. A new one belongs here, or is marked `per_rank` in `settings`.
TEXTS = {
    "clone_terms",
    "kl_divergence",
    "split",
    "student_layers",
    "pipeline_model_parallel_layout",
    "recompute_modules",
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda setting: setting.name)
def test_every_setting_is_compared_or_marked(setting):
    is_text = setting.kind in (str, list[str]) and not setting.choices
    assert setting.per_rank or not is_text or setting.name in TEXTS, "a path, or a text that all ranks must share?"
    config = Config()
    before = describe_settings(config)
    value = {bool: not setting.default, int: 7, float: 0.7, str: "other"}.get(setting.kind, ["other"])
    setattr(getattr(config, setting.section), setting.name, setting.choices[-1] if setting.choices else value)
    changed = {name for name, text in describe_settings(config).items() if text != before[name]}
    is_compared = setting.per_rank is None or setting.name == "save"  # which is, as far as there is one
    assert changed == ({flag_of(setting.name)} if is_compared else set())


@pytest.fixture
def config(tiny_llama, tiny_text, tmp_path) -> Config:
    """One that may spoil its files; it goes on from a checkpoint."""
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copytree(tiny_llama(), folder / "teacher")
    for suffix in (".idx", ".bin"):
        shutil.copy(tiny_text + suffix, folder / f"text{suffix}")
    return at(folder)


def at(folder: Path) -> Config:
    config = make_config(str(folder / "teacher"), str(folder / "text"), folder / "new", steps=5)
    return config.resolved(1)


def differences(config: Config, before: dict[str, str]) -> set[str]:
    after = describe_rank(check(config, 1), 1)
    return {name for name in before | after if before.get(name) != after.get(name)}


def flip(path: Path, place: float) -> None:
    """A byte of a file, as far into it as `place` of its length: of a token id the lower one."""
    content = bytearray(path.read_bytes())
    content[min(int(len(content) * place), len(content) - 1) & ~1] ^= 1
    path.write_bytes(content)


def test_files_may_lie_elsewhere(config, tmp_path):
    before = describe_rank(check(config, 1), 1)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = at(tmp_path / "there")
    moved.data.data_cache_path, moved.data.num_workers = str(tmp_path), 3
    moved.logging.wandb_project, moved.logging.peak_tflops = None, 5.0
    assert differences(moved, before) == set()


@pytest.mark.parametrize(("file", "place"), [("text.bin", 0.0), ("text.bin", 0.5), ("text.bin", 1.0)])
def test_data_of_the_same_size_is_other_data(config, tmp_path, file, place):
    before = describe_rank(check(config, 1), 1)
    flip(tmp_path / "here" / file, place)
    assert differences(config, before) == {"dataset 1 of --data-path"}


def test_data_in_other_documents_or_by_another_tokenizer_is_other_data(config, tmp_path):
    before = rank_identity.describe_data(config)
    index = tmp_path / "here/text.idx"
    flip(index, 1.0)  # the last document's first sequence
    changed = rank_identity.describe_data(config)
    assert changed != before
    flip(index, 1.0)
    assert rank_identity.describe_data(config) == before


def test_a_manifest_counts_but_for_its_paths(config, tmp_path):
    manifest = {
        "tokenizer": {"model": "here", "fingerprint": "a", "vocab_size": 301, "eod": 2},
        "sources": [{"path": "here"}],
        "documents": 200,
        "tokens": 10000,
    }

    def described(**tokenizer: object) -> dict[str, str]:
        values = manifest | {"tokenizer": manifest["tokenizer"] | tokenizer, "sources": [tokenizer]}
        (tmp_path / "here/text.json").write_text(json.dumps(values))
        return rank_identity.describe_data(config)

    assert described(model="here") == described(model="there") != described(eod=3)


def test_weights_and_order_of_datasets_count(config, tmp_path):
    text, other = config.data.data_path[0], str(tmp_path / "here/other")
    for suffix in (".idx", ".bin"):
        shutil.copy(text + suffix, other + suffix)
    flip(Path(other + ".bin"), 0.0)
    found = []
    for paths in (["1", text, "2", other], ["2", text, "1", other], ["1", other, "2", text]):
        config.data.data_path = paths
        found.append(rank_identity.describe_data(config))
    weights = "the list of weights of --data-path"
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {weights}
    assert weights not in {name for name in found[0] if found[0][name] != found[2][name]} != set()


def test_another_teacher_is_named(config, tmp_path):
    before = describe_rank(check(config, 1), 1)
    flip(tmp_path / "here/teacher/model.safetensors", 1.0)
    assert differences(config, before) == {"what lies at --teacher"}


def test_the_checkpoints_that_are_seen_count_wherever_they_lie(config, tmp_path):
    config.checkpoint.load = str(tmp_path / "run")
    teacher = describe_teacher(config.base_model or "")
    config.model.student_hidden_size, config.training.train_iters = 24, 9
    without = {"the checkpoint to go on from": "none", "what lies at --pretrained-checkpoint": "none"}
    path = write_run(tmp_path / "run", teacher, *random_student(teacher, 24, has_lm_head=True))
    before = rank_identity.describe_checkpoints(check(config, 1))
    assert before["the checkpoint to go on from"].startswith("iter_0000003 ") and before.keys() == without.keys()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    config.checkpoint.load = str(tmp_path / "elsewhere")
    assert rank_identity.describe_checkpoints(check(config, 1)) == before
    config.checkpoint.load, config.checkpoint.pretrained_checkpoint = None, str(tmp_path / "elsewhere")
    as_weights = rank_identity.describe_checkpoints(check(config, 1))
    assert as_weights == dict(zip(without, reversed(before.values()), strict=True))
    state = tmp_path / "elsewhere" / path.name / "run.json"
    values = json.loads(state.read_text())
    del values["crc32"]  # older checkpoints have none
    state.write_text(json.dumps(values))
    assert rank_identity.describe_checkpoints(check(config, 1)) != as_weights


def test_a_changed_comment_in_the_code_is_named_by_its_file(tmp_path):
    package = tmp_path / "megatron_lrc"
    shutil.copytree(Path(megatron_lrc.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = rank_identity._describe_code(package)
    assert before == rank_identity._describe_code(Path(megatron_lrc.__file__).parent)
    with open(package / "train/step.py", "a") as file:
        file.write("# changed\n")
    after = rank_identity._describe_code(package)
    assert {name for name in after if after[name] != before[name]} == {"megatron_lrc/train/step.py"}


def test_the_tokenizer_counts_where_it_says_where_documents_end(config, tokenizer_folder):
    assert "the tokenizer" not in describe_rank(check(config, 1), 1)
    config.data.eod_mask_loss, found = True, []
    for tokenizer in (config.model.teacher, tokenizer_folder):
        config.data.tokenizer_model = tokenizer
        found.append(rank_identity._describe_tokenizer(config)["the tokenizer"])
    assert found[0] != found[1]


def test_variables_that_choose_kernels_count_and_those_of_debugging_do_not(config, monkeypatch):
    before = describe_rank(check(config, 1), 1)
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "7")
    monkeypatch.setenv("NVTE_DEBUG_LEVEL", "2")
    monkeypatch.setenv("NVTE_CUDA_INCLUDE_PATH", "/opt/cuda/include")
    monkeypatch.setenv("HOSTNAME", "other")
    assert differences(config, before) == {"NVTE_FLASH_ATTN", "CUDA_DEVICE_MAX_CONNECTIONS"}


def test_ranks_with_other_gpus_are_warned_of(config, monkeypatch):
    monkeypatch.setattr(alike, "describe_device", lambda: threading.current_thread().name)
    store = HashStore()
    with ThreadPoolExecutor(2, "gpu") as threads:
        checked = list(threads.map(lambda rank: check_alike(config, Meeting(store, rank, 2)), range(2)))
    (warning,) = set(checked[0].warnings) - set(checked[1].warnings)
    assert warning.startswith("the ranks' devices differ, and all are as slow as the slowest: gpu_")


def test_one_process_compares_nothing(config, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(rank_identity, "describe_data", lambda config: 1 / 0)
    assert check_alike(config, meet(config)).config == config
