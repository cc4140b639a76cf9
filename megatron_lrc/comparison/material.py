"""What contestants train on where the user names no teacher: text, tokenizer, indexed data and a small teacher.

Nothing is downloaded: the text is the demo's (docstrings and help pages of this Python environment), the tokenizer is
byte-level BPE trained on it, and the teacher is trained on it by `--method ordinary` in the same engine as the
contestants, then exported. All of it lies in a folder that is named after its settings, so that other settings make
other material, and runs on the old one are not taken for runs on the new one. A step whose output is there is not done
again.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lrc.config import ConfigError
from megatron_lrc.json_files import read_json
from megatron_lrc.train.jsonl import read_records
from megatron_lrc.whole_files import write_whole

END_OF_TEXT = "<|endoftext|>"
PROGRAM = [sys.executable, "-m", "megatron_lrc"]


@dataclass(frozen=True, slots=True)
class TeacherSettings:
    """The default teacher's shape and training. Sizes in features, heads, layers; lengths in tokens."""

    hidden_size: int = 256
    num_layers: int = 4
    ffn_hidden_size: int = 688
    num_attention_heads: int = 4
    num_query_groups: int = 2
    head_dim: int = 64
    vocab_size: int = 4096
    seq_length: int = 128
    tokens: int = 3_000_000
    tokens_per_step: int = 2048
    lr: float = 2e-3
    seed: int = 1234
    text: str = ""  # a JSON-lines file instead of the collected text

    @property
    def sequences_per_step(self) -> int:
        return max(1, self.tokens_per_step // self.seq_length)

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.sequences_per_step * self.seq_length))

    def folder_name(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"material-{digest[:8]}"


@dataclass(frozen=True, slots=True)
class Material:
    """What every contestant is given. data: the flags that name training and held-out data; heldout: prefixes of
    datasets that are held out as a whole; num_layers: the teacher's."""

    teacher: Path
    data: tuple[str, ...]
    note: str
    heldout: tuple[str, ...] = ()
    num_layers: int = 1

    def newest_change(self) -> float:
        """Time stamp of the last change to the teacher or the data: runs from before it are not theirs."""
        # Hidden files are no part of the teacher: what its files were found to hold is remembered in one.
        files = [path for path in self.teacher.glob("[!.]*") if path.is_file()]
        for prefix in (word for word in self.data if not word.startswith("-")):
            files += [Path(prefix + suffix) for suffix in (".bin", ".idx") if Path(prefix + suffix).exists()]
        return max((path.stat().st_mtime for path in files), default=0.0)


#: Runs a command, its output in a log file named by the first argument; raises ConfigError with the last line if it
#: fails.
Call = Callable[[str, list[str]], None]


def described_material(output: Path, settings: TeacherSettings) -> Material:
    """The default material's places, whether it has been made or not."""
    folder = output / settings.folder_name()
    note = (
        f"The teacher ({settings.num_layers} layers, hidden size {settings.hidden_size}, vocabulary "
        f"{settings.vocab_size}) was itself trained on {settings.tokens:,} tokens of this text."
    )
    return material_in(folder, folder / "teacher", note, settings.num_layers)


def material_in(folder: Path, teacher: Path, note: str, num_layers: int) -> Material:
    """With the datasets that `index_text` writes."""
    heldout = f"{folder}/heldout_text_document"
    data = ("--train-data-path", f"{folder}/train_text_document", "--valid-data-path", heldout)
    return Material(teacher, data, note, (heldout,), num_layers)


def num_layers_of(teacher: Path) -> int:
    """Of a Hugging Face directory; 1 where its configuration does not say it, as a run will complain."""
    try:
        return int(read_json(teacher / "config.json")["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return 1


def index_text(folder: Path, tokenizer: Path, *, call: Call) -> None:
    """train and heldout of the folder `text`, as indexed datasets beside it."""
    for part in ("train", "heldout"):
        prefix = folder / part
        if not Path(f"{prefix}_text_document.json").is_file():
            words = ["--input", str(folder / "text" / f"{part}.jsonl"), "--output-prefix", str(prefix)]
            call(f"index-{part}", [*PROGRAM, "preprocess", *words, "--tokenizer-model", str(tokenizer), "--append-eod"])


def make_material(output: Path, settings: TeacherSettings, *, call: Call) -> Material:
    """The default material in `output`, made where it is missing."""
    folder, material = output / settings.folder_name(), described_material(output, settings)
    folder.mkdir(parents=True, exist_ok=True)
    text, start, teacher = folder / "text", folder / "untrained", material.teacher
    collect(text, call, own_text=settings.text)
    if not (start / "config.json").is_file():
        write_tokenizer(text / "train.jsonl", start, settings.vocab_size)
        write_shape(start, settings)
    index_text(folder, start, call=call)
    if not (teacher / "config.json").is_file():
        run = folder / "teacher-run"
        call("teacher", [*PROGRAM, "train", *_teacher_flags(start, run, settings), *material.data])
        if last_step(run / "validation.jsonl") != settings.steps:
            raise ConfigError(f"the teacher's training in {run} was stopped. Run the same command again to go on.")
        call("export", [*PROGRAM, "convert-to-hf", "--load", str(run), "--output", str(teacher)])
    return material


def last_step(records: Path) -> int:
    """Of the last record in the file; -1 without one."""
    steps = [record["step"] for record in read_records(records)]
    return steps[-1] if steps else -1


def collect(text: Path, call: Call, *, own_text: str = "") -> None:
    """train.jsonl and heldout.jsonl: collected, or every 20th document of the user's file held out."""
    if (text / "heldout.jsonl").is_file():
        return
    if not own_text:
        return call("text", [sys.executable, "-m", "megatron_lrc.comparison.collect_text", "--output-dir", str(text)])
    lines = [line for line in Path(own_text).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < 20:
        raise ConfigError(f"--text {own_text} has {len(lines)} documents. At least 20 lines of JSON are needed.")
    text.mkdir(parents=True, exist_ok=True)
    parts = {"train": [line for place, line in enumerate(lines) if place % 20], "heldout": lines[::20]}
    for name, chosen in parts.items():
        write_whole(text / f"{name}.jsonl", "".join(line + "\n" for line in chosen))


def _teacher_flags(start: Path, run: Path, settings: TeacherSettings) -> list[str]:
    sequences, steps = settings.sequences_per_step, settings.steps
    flags = (
        f"--method ordinary --student-hidden-size {settings.hidden_size} --seq-length {settings.seq_length} "
        f"--micro-batch-size {sequences} --global-batch-size {sequences} --train-iters {steps} --lr {settings.lr} "
        f"--lr-decay-style cosine --lr-warmup-fraction 0.03 --weight-decay 0.1 --adam-beta2 0.95 "
        f"--seed {settings.seed} --eval-interval {max(1, steps // 8)} --eval-iters 16 "
        f"--log-interval {max(1, steps // 100)}"
    )
    return ["--teacher", str(start), *flags.split(), "--save", str(run), "--load", "auto", "--save-interval", "200"]


def write_tokenizer(texts: Path, directory: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens, as a Hugging Face directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with texts.open(encoding="utf-8") as file:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in file), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"{texts} gives a vocabulary of {tokenizer.get_vocab_size()} tokens; {vocab_size} were asked for. Use more "
            f"text, or --vocab-size {tokenizer.get_vocab_size()}."
        )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    write_whole(directory / "tokenizer_config.json", json.dumps(settings, indent=2))


def write_shape(directory: Path, settings: TeacherSettings) -> None:
    """The config.json that `--method ordinary` takes the teacher's shape from. Untied, so that every contestant's
    student has the same parameters, whether its method ties embedding and LM head or not."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "intermediate_size": settings.ffn_hidden_size,
        "num_attention_heads": settings.num_attention_heads,
        "num_key_value_heads": settings.num_query_groups,
        "head_dim": settings.head_dim,
        "vocab_size": settings.vocab_size,
        "max_position_embeddings": max(settings.seq_length, 2048),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    write_whole(directory / "config.json", json.dumps(config, indent=2))
