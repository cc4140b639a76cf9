"""Stage 6: a clone trained for as long as there is time, whose loss has to fall.

With --teacher of that model, on the help topics of Python, by the settings of the preset `recommended`; without it of
the small random teacher, on counting.
"""

import json
import os
import time
from pydoc_data.topics import topics
from statistics import fmean

from benchmarks.gpu_check.checks import Bound, Check, Checks, Figures
from benchmarks.gpu_check.settings import Settings
from benchmarks.gpu_check.short_runs import parse, run_flags, train
from benchmarks.gpu_check.small_teacher import write_counting
from megatron_lrc.data.indexing import index_documents
from megatron_lrc.data.preparation import IndexingOptions
from megatron_lrc.hf.families import describe_teacher

#: Seconds that are kept for the start and the end of the training; and the steps of one that is --tiny.
SECONDS_BESIDE, TINY_STEPS = 15.0, 20
#: Of the steps, the share at each end whose losses are compared; and what the last ones may be of the first ones.
SHARE, FALLEN = 0.2, 0.99


def checks(settings: Settings) -> Checks:
    end = time.monotonic() + settings.seconds - SECONDS_BESIDE
    whose = settings.teacher or "a small random teacher, on counting"
    yield Check(f"training a clone of {whose}", lambda: training(settings, end))


def training(settings: Settings, end: float) -> Figures:
    """end: when the last step is to begin, by time.monotonic."""
    flags = flags_of_given(settings) if settings.teacher else flags_of_small(settings)
    if not settings.is_tiny:
        flags += ["--exit-duration-in-mins", str(max(end - time.monotonic(), 1.0) / 60)]
    records, _ = train(parse([*flags, "--save", str(settings.folder / "training")]))
    losses = [record["loss"] for record in records]
    some = max(1, int(SHARE * len(losses)))
    first, last = fmean(losses[:some]), fmean(losses[-some:])
    return {
        "steps": len(losses),
        "first loss": first,
        "last loss": last,
        "last over first": Bound(last / first, FALLEN),
        "tokens/s": records[-1]["tokens_per_second"],
    }


def flags_of_small(settings: Settings) -> list[str]:
    steps = TINY_STEPS if settings.is_tiny else 100_000
    flags = [*run_flags(settings, write_counting(settings), steps), "--lr", "5e-3", "--lr-decay-style", "constant"]
    return flags + ["--bf16"] * settings.is_cuda


def flags_of_given(settings: Settings) -> list[str]:
    """At half the teacher's hidden size."""
    teacher, folder = str(settings.teacher), settings.folder
    text = folder / "text.jsonl"
    documents = list(topics.values())[: 10 if settings.is_tiny else None]  # 0.7 MB of English
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    options = IndexingOptions(
        input=[str(text)],
        output_prefix=str(folder / "text"),
        tokenizer_model=teacher,
        workers=1 if settings.is_tiny else min(os.cpu_count() or 1, 8),
    )
    index_documents(options, report=lambda line: None)
    hidden = describe_teacher(teacher).shape.hidden_size
    values = {
        "--preset": "recommended",
        "--teacher": teacher,
        "--student-hidden-size": hidden // 2,
        "--data-path": folder / "text_text_document",
        "--split": "90,10,0",
        "--seq-length": 64 if settings.is_tiny else 512,
        "--micro-batch-size": 4,
        "--global-batch-size": 8,
        "--calibration-tokens": 1024 if settings.is_tiny else 16384,
        "--train-iters": TINY_STEPS if settings.is_tiny else 100_000,
        "--lr": 1e-2 if settings.is_tiny else "auto",
        "--lr-warmup-iters": 5,
        "--lr-decay-style": "constant",
        "--log-interval": 1,
        "--eval-iters": 0,
    }
    return [str(part) for pair in values.items() for part in pair] + ["--bf16"] * settings.is_cuda
