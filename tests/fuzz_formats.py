"""Every format of files that the product reads: how to write a good one, how to damage it, and what reads it."""

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import gguf_files
from checkpoints import write_run
from fuzzing import damage_bytes, damage_json, damage_text
from hf_teachers import write_llama
from megatron_lrc.checkpoints.boxes import read_box
from megatron_lrc.checkpoints.index import UnsafeCheckpoint, read_index, refuse_code
from megatron_lrc.checkpoints.layout import whole_box
from megatron_lrc.checkpoints.run_directory import STATE_FILE, find_changed, find_missing, read_state
from megatron_lrc.config import ConfigError, load_yaml
from megatron_lrc.data import indexed_files, inspection
from megatron_lrc.data.checksums import check_checksums, write_checksums
from megatron_lrc.data.indexing import IndexingOptions
from megatron_lrc.data.merging import merged_manifest
from megatron_lrc.data.mixtures import read_sources
from megatron_lrc.data.restart import Done, Journal, Position
from megatron_lrc.data.tokenizers import load_tokenizer
from megatron_lrc.evaluation.questions import read_questions
from megatron_lrc.evaluation.watching import read_evaluations
from megatron_lrc.hf.checkpoint_reader import open_teacher
from megatron_lrc.hf.families import describe_teacher
from megatron_lrc.hf.forward import HuggingFaceModel
from megatron_lrc.hf.gguf import read_gguf
from megatron_lrc.hf.teacher_identity import read_everything
from megatron_lrc.report.run_files import read_run
from megatron_lrc.report.run_page import render
from students import random_student
from tiny_data import make_texts, write_jsonl, write_tokenizer
from tools_path import tool_main

#: What a command makes one line of.
SENTENCES = (ConfigError, UnsafeCheckpoint)
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[U]{{ message['content'] | trim }}"
    "{% elif loop.last %}{{ bos_token }}{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% set ns = namespace(found=false) %}{% if add_generation_prompt %}{{ strftime_now('%Y') }}{% endif %}"
)
JINJA = [
    *("{{", "}}", "{%", "%}", "{#", "#}", "(", ")", "[", "]", "{{ [", "{% if x %}", "{% endif %}", "{% raw %}", "''"),
    *("{% for a in messages %}", "{% endfor %}", "{{ messages }}", "{{ 9 ** 9 }}", "{{ 'a' * 99999 }}", "| tojson"),
    *("{{ self }}", "{{ messages.__class__ }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% import 'x' %}"),
    *("{{ raise_exception('x') }}", "{{ range(100) | list }}", "| length", "{{ undefined.x.y }}", "{{ 1 / 0 }}"),
]
YAML = [
    *("- ", ": ", "\n", "  ", "[", "{", "]", "}", "'", '"', "&a ", "*a", "? ", "| ", "> ", "!!python/name:os.system "),
    *("!!int ", "!!binary ", "!!set ", "!!timestamp ", "1e999", "0x", "9" * 400, "2001-99-99", "1:60:60", "~", "\t"),
    *("\n- - - ", "{a: ", "\0", "\n---\n", "%YAML 9.9\n", "<<: *a\n", "\n? [a]\n: b\n"),
]


@dataclass(frozen=True)
class Format:
    """file: of the folder that `make` fills, and which is damaged. read: raises SENTENCES, or nothing."""

    file: str
    make: Callable[[Path], object]
    damage: Callable[[random.Random, bytes], bytes]
    read: Callable[[Path], object]
    cases: int


# ------------------------------------------------------------------------------------------------ models


def read_teacher(folder: Path) -> None:
    description = describe_teacher(folder)
    reader = open_teacher(description)
    contents = read_everything(reader)
    reader.fingerprint(contents)
    reader.suspicious(contents)
    for layer in range(description.shape.num_layers):
        reader.norm("input", layer)


def read_by_transformers(folder: Path) -> None:
    HuggingFaceModel(folder)


def shard(folder: Path) -> None:
    write_llama(folder)
    from safetensors import safe_open

    names = list(safe_open(folder / "model.safetensors", "pt").keys())
    os.rename(folder / "model.safetensors", folder / "part.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def convert(folder: Path) -> None:
    write_llama(folder / "source")
    convert_from_hf = tool_main("convert_from_hf")
    assert convert_from_hf(["--hf-model", str(folder / "source"), "--output", str(folder / "teacher")]) == 0


def write_gguf(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    write_llama(folder / "source")
    model = LlamaForCausalLM.from_pretrained(folder / "source")
    gguf_files.write_gguf(folder / "model.gguf", model, folder / "source")


# ------------------------------------------------------------------------------------------------ runs


def write_checkpoint(folder: Path) -> None:
    write_llama(folder / "teacher")
    teacher = describe_teacher(folder / "teacher")
    projections, norms = random_student(teacher, 28, has_lm_head=True)
    shutil.copytree(write_run(folder / "run", teacher, projections, norms), folder / "iter_0000003")


def read_checkpoint(folder: Path) -> None:
    """Whatever its list of files says: who writes an index may write that, too."""
    folder = folder / "iter_0000003"
    index = read_index(folder)
    files = FileSystemReader(folder)
    files.set_up_storage_reader(index, is_coordinator=True)
    for key, stored in index.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            read_box(files, stored, whole_box(key, tuple(stored.size)))


def copy_checkpoint(folder: Path) -> None:
    saved = Path(__file__).parent / "fixtures/old_checkpoints/lrc/iter_0000003"
    shutil.copytree(saved, folder / "iter_0000003")


def read_run_record(folder: Path) -> None:
    path = folder / "iter_0000003"
    if find_missing(path) is None:
        find_changed(path)
        read_state(path)


def damage_with_its_sum(rng: random.Random, content: bytes) -> bytes:
    """As somebody would who wants it to be taken for whole."""
    try:
        values = json.loads(damage_json(rng, content))
        others = {name: value for name, value in values.items() if name != "crc32"}
        return json.dumps(others | {"crc32": zlib.crc32(json.dumps(others, sort_keys=True).encode())}).encode()
    except (ValueError, AttributeError, RecursionError):
        return content


RECORD = {
    **{"step": 2, "tokens": 64, "loss": 3.0, "lm_loss": 2.0, "kl_loss": 0.5, "clone_loss": 0.1, "lr": 1e-3},
    **{"clone_by_layer": {"q": [0.1, 0.2]}, "grad_norm": 1.0, "grad_norm_by_group": {"q": 0.5}, "skipped_steps": 0},
    **{
        "step_seconds": 0.5,
        "tokens_per_second": 100.0,
        "tflops": {"total": 1.0, "projections": 0.5},
        "loss_scale": 2.0,
    },
    **{"memory_gib": {"peak": 1.0, "now": 0.5}, "time": "2026-01-01T00:00:00+00:00", "teacher_lm_loss": 1.5},
    **{"straggler": {"data_seconds": 0.1, "compute_seconds": 0.2, "peers_seconds": 0.2}, "mfu": {"total": 0.3}},
    **{"effective_rank": {"teacher": [3.0, 4.0], "student": [2.0, 3.0]}, "warning": "w", "teacher_kl": 0.1},
    **{"heldout": {"text": {"lm_loss": 2.0}}, "tasks": {"scores": {"a": 0.5}, "stderr": {"a": 0.1}}, "crc32": 5},
    **{"train_iters": 9, "checkpoint": "a/iter_2", "lost_steps": 1, "lost_seconds": 2.0, "world_size": 2, "hosts": 1},
    **{"layout": {"tp": 2, "pp": 1}, "versions": {"torch": "2"}},
}
RECORD_FILES = ("metrics.jsonl", "validation.jsonl", "evaluations.jsonl", "starts.jsonl")


def write_records(folder: Path) -> None:
    (folder / "record.json").write_text(json.dumps(RECORD))


def read_report(folder: Path) -> None:
    """The damaged record between two good ones, in every file that has records."""
    from datetime import datetime, timezone

    damaged = (folder / "record.json").read_bytes().replace(b"\n", b" ")
    lines = [json.dumps(RECORD).encode(), damaged, json.dumps(RECORD | {"step": 4, "tokens": 128}).encode()]
    for name in RECORD_FILES:
        (folder / name).write_bytes(b"\n".join(lines))
        render(read_run(folder), datetime.now(timezone.utc))
    (folder / "metrics.jsonl").write_bytes(damaged)
    render(read_run(folder), datetime.now(timezone.utc))
    read_evaluations(folder)


# ------------------------------------------------------------------------------------------------ data


def write_indexed(folder: Path) -> None:
    tokenizer = write_tokenizer(folder / "tokenizer")
    source = write_jsonl(folder / "text.jsonl", make_texts(20))
    flags = ["--input", source, "--output-prefix", str(folder / "data"), "--tokenizer-model", tokenizer]
    assert tool_main("preprocess_data")([*flags, "--append-eod", "--filter", "text != x"]) == 0


def read_indexed(folder: Path) -> None:
    index = indexed_files.read_index(str(folder / "data_text_document"), allow_empty_documents=True)
    inspection.describe(index)
    inspection.describe_lengths(inspection.document_lengths(index))
    indexed_files.check_token_ids(index, None)
    merged_manifest([index, index])


def write_journal(folder: Path) -> None:
    counts = {"text": {"documents": 3, "sequences": 3, "tokens": 9, "empty": 0}}
    done = Done(position=Position(source=1, lines=2, num_bytes=3), counts=counts, rows={"kept": 3}, text_bytes=20)
    Journal(str(folder / "journal.json"), {}).write(done, lambda: None)


def read_journal(folder: Path) -> None:
    Journal(str(folder / "journal.json"), {}).read()


def write_cache(folder: Path) -> None:
    (folder / "cache").mkdir()
    (folder / "cache" / "shuffle.npy").write_bytes(b"123")
    write_checksums(str(folder / "cache"), name="cache")


def write_questions(folder: Path) -> None:
    (folder / "questions.jsonl").write_text(json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": 1}))


SOURCES = """
- name: books
  input: [books/*.jsonl, more.txt]
  filter: ["score >= 3"]
  sample_fraction: 0.5
  max_tokens: 10M
- name: web
  input: web.jsonl
"""
CONFIG = """
preset: lrc-1.5b
student-hidden-size: 1536
model:
  teacher: models/teacher
lr: 1.0e-4
train_iters: 100
data-path: [0.5, a, 0.5, b]
bf16: true
"""


def read_sources_file(folder: Path) -> None:
    options = IndexingOptions(input=[], output_prefix=str(folder / "out"), tokenizer_model=str(folder))
    read_sources(str(folder / "sources.yaml"), options)


def read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.encode_batch(["a word1 \n"])


def write_template(folder: Path) -> None:
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def read_template(folder: Path) -> None:
    chat = load_tokenizer(str(folder)).chat
    assert chat is not None
    chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def write_text(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


FORMATS: dict[str, Format] = {
    "safetensors": Format("model.safetensors", write_llama, damage_bytes, read_teacher, 150),
    "config.json": Format("config.json", write_llama, damage_json, read_teacher, 200),
    "config.json by transformers": Format("config.json", write_llama, damage_json, read_by_transformers, 40),
    "safetensors index": Format("model.safetensors.index.json", shard, damage_json, read_teacher, 100),
    "converted teacher": Format(
        "teacher/megatron_lrc.json", convert, damage_json, lambda folder: read_teacher(folder / "teacher"), 60
    ),
    "GGUF": Format("model.gguf", write_gguf, damage_bytes, lambda folder: read_gguf(folder / "model.gguf"), 100),
    "checkpoint index": Format("iter_0000003/.metadata", write_checkpoint, damage_bytes, read_checkpoint, 300),
    "checkpoint of megatron-core": Format(
        "iter_0000003/.metadata",
        copy_checkpoint,
        damage_bytes,
        lambda folder: refuse_code(folder / "iter_0000003"),
        100,
    ),
    "run.json": Format(f"iter_0000003/{STATE_FILE}", copy_checkpoint, damage_json, read_run_record, 300),
    "run.json with its sum": Format(
        f"iter_0000003/{STATE_FILE}", copy_checkpoint, damage_with_its_sum, read_run_record, 300
    ),
    "records": Format("record.json", write_records, damage_json, read_report, 150),
    "manifest": Format("data_text_document.json", write_indexed, damage_json, read_indexed, 300),
    ".idx": Format("data_text_document.idx", write_indexed, damage_bytes, read_indexed, 300),
    "journal": Format("journal.json", write_journal, damage_json, read_journal, 500),
    "checksums": Format(
        "cache/checksums.json", write_cache, damage_json, lambda folder: check_checksums(str(folder / "cache")), 200
    ),
    "questions": Format(
        "questions.jsonl", write_questions, damage_json, lambda folder: read_questions(folder / "questions.jsonl"), 300
    ),
    "YAML config": Format(
        "config.yaml",
        write_text("config.yaml", CONFIG),
        damage_text(YAML),
        lambda folder: load_yaml(folder / "config.yaml"),
        200,
    ),
    "YAML sources": Format(
        "sources.yaml", write_text("sources.yaml", SOURCES), damage_text(YAML), read_sources_file, 150
    ),
    "tokenizer.json": Format("tokenizer.json", write_tokenizer, damage_json, read_tokenizer, 150),
    "tokenizer_config.json": Format("tokenizer_config.json", write_tokenizer, damage_json, read_tokenizer, 80),
    "chat template": Format("chat_template.jinja", write_template, damage_text(JINJA), read_template, 80),
}
