"""Every path, module, flag and name that prose puts into backticks exists.

Prose is the pages at the top and in docs/, and the docstrings and comments of the code. A name exists if the code
uses it (`tests/names.py`): `Class.member` needs that member, `module.name` that definition. A path exists if a file's
path ends with it. A file that a command makes exists if the code has its name as a string; what a user names is in
capitals (RUN, TEACHER). FOREIGN is what belongs to others and is never used by our code.
"""

import functools
import re
from collections.abc import Iterator

import pytest

from names import ROOT, Names, make_targets

MARKDOWN = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SUFFIXES = re.compile(
    r"\.(py|sh|sbatch|md|svg|png|html|css|js|jsonl?|yaml|toml|txt|log|bin|idx|gguf|safetensors|model|gz|zst|parquet)$"
)
#: What no command makes, so that it has to be in the repository: by suffix, and by the folder that it is in.
OUR_SUFFIXES = (".py", ".sh", ".sbatch")
OUR_FOLDERS = {path.name for path in (ROOT, ROOT / "megatron_lrc") for path in path.iterdir() if path.is_dir()}
#: Folders that commands make, or users.
MADE_FOLDERS = ("demo", "runs", "cache", "tensorboard", "release", "iter_", "mmlu")

#: Word -> whose it is. Nothing of ours belongs here.
FOREIGN = {
    "P": "the projection, as the paper writes it",
    "dW_S": "the gradient of W_S, in equations",
    "PIP_EXTRA_INDEX_URL": "pip",
    "--no-build-isolation": "pip",
    **dict.fromkeys(("--exclude", "--include", "--local-dir", "--repo-type"), "hf download"),
    **dict.fromkeys(("--ipc", "--ulimit"), "docker"),
    "dmesg": "a command of Linux",
    "died": "a word of a message",
    "PR_SET_PDEATHSIG": "Linux",
    "SignalException": "torch.distributed.elastic",
    "CUDA_HOME": "CUDA",
    "--no-cache-dir": "pip",
    "--force-reinstall": "pip",
    "--no-python": "torchrun",
    "--long": "zstd",
    "--nodes": "Slurm's sbatch",
    "--flag": "stands for any flag",
    "NCCL_SOCKET_IFNAME": "NCCL",
    "GLOO_SOCKET_IFNAME": "torch",
    "safetensors": "the package of that name",
    "finalize_model_grads_func": "megatron-core",
    "flattened_range": "megatron-core",
    "cublaslt_gemm.cu": "Transformer Engine",
    "quantization.py": "Transformer Engine",
    "TASK/SPLIT.jsonl": "a user's folder",
}


@functools.cache
def names() -> Names:
    return Names()


def test_the_versions_of_python_are_those_of_the_metadata():
    minors = [int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", (ROOT / "setup.py").read_text())]
    assert minors == list(range(minors[0], minors[-1] + 1))
    for file in ("README.md", "docs/support.md", "megatron_lrc/data/datasets.py"):
        assert f"Python 3.{minors[0]} to 3.{minors[-1]}" in (ROOT / file).read_text(), file
    tested = (ROOT / "docs/tested.md").read_text()
    assert all(f"3.{minor}" in tested for minor in minors)


# --- what exists -----------------------------------------------------------------------------------------------------


def missing(text: str) -> list[str]:
    """What of a backticked text does not exist. Of several words, a command, flags, paths and targets of make count."""
    words = text.split()
    bare = [word.strip("\"',;:[]{}").rstrip(".)") for word in words]
    found = [word for word in bare if word.startswith("--") and not flag_exists(word)]
    found += [word for word in bare if looks_like_a_path(word) and not path_exists(word)]
    pairs = zip(words, words[1:], strict=False)
    found += [f"make {target}" for command, target in pairs if command == "make" and target not in make_targets()]
    if len(words) == 1 and not looks_like_a_path(bare[0]):
        word = re.sub(r"\(.*\)$", "", bare[0] + ")" if "(" in bare[0] else bare[0])
        if re.fullmatch(r"[A-Za-z_][\w.]*", word) and not name_exists(word):
            found.append(word)
    return found


def flag_exists(word: str) -> bool:
    flag = re.split(r"[=\[|]", word)[0]
    return flag in names().flags or flag in FOREIGN or flag.startswith(tuple(names().prefixes))


def looks_like_a_path(word: str) -> bool:
    if not re.fullmatch(r"[\w.*/:-]+", word) or word.startswith(("-", "/")) or "//" in word:
        return False
    return SUFFIXES.search(re.sub(r":\d+$", "", word)) is not None or "/" in word


def path_exists(word: str) -> bool:
    path = re.sub(r":\d+$", "", word).rstrip("/")
    if path in names().ends or word in FOREIGN:
        return True
    if "*" in path:
        pattern = re.compile(re.escape(path).replace(r"\*", "[^/]*"))
        return any(pattern.fullmatch(end) for end in names().ends)
    first, *_ = parts = path.split("/")
    if path.endswith(OUR_SUFFIXES) or (len(parts) > 1 and first in OUR_FOLDERS - set(MADE_FOLDERS)):
        return False
    known = MADE_FOLDERS if word.endswith("/") else names().strings
    return all(stem_of(part) in known or stem_of(part) in ("", *MADE_FOLDERS) for part in parts)


def stem_of(part: str) -> str:
    """A component of a path up to a number, or a placeholder in capitals."""
    return re.split(r"N{3,}|\d{3,}|[A-Z]{3,}", part)[0]


def name_exists(word: str) -> bool:
    known, parts = names(), word.strip(".").split(".")
    if word in FOREIGN or parts[0] in FOREIGN or known.is_module(parts) or stem_of(word) in MADE_FOLDERS:
        return True
    if len(parts) == 1:
        return word in known.used
    owner, name = parts[-2:]
    if owner in known.members:
        return known.has_member(owner, name)
    is_of_others = owner[0].isupper() and {owner, name} <= known.used
    is_defined = name in known.top_level.get(owner, ())
    return is_of_others or is_defined or f"{owner}.{name}" in known.chains or word in known.strings


# --- prose -----------------------------------------------------------------------------------------------------------


def texts_of(page: str) -> Iterator[str]:
    """Backticked texts of a page; and of its blocks of code the flags, the files, and the targets of make."""
    code = re.compile(r"^(?: {4}|\t).*$", re.MULTILINE)
    for line in code.findall(page):
        yield from (f"{word} " for word in re.findall(r"(?<!\S)--[a-z][\w-]+", line))
        yield from re.findall(r"(?<!\S)(?:tools|examples|tests)/[\w./-]+", line)
        yield from re.findall(r"^ +make [\w-]+", line)
    yield from backticked(code.sub("", page))


def backticked(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_what_a_page_names_exists(path):
    page = path.read_text(encoding="utf-8")
    assert {text: found for text in texts_of(page) if (found := missing(text))} == {}


def test_what_docstrings_and_comments_name_exists():
    """Modules also without backticks."""
    for where, text in names().prose:
        modules = re.findall(r"(?<![\w/*{}.-])[\w/]*\w\.py\b", text)
        stale = [found for token in [*backticked(text), *modules] for found in missing(token)]
        assert stale == [], where


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    files = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [target for target in files if target and not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_no_page_has_what_a_merge_left(path):
    assert re.findall(r"^(?:<{7}|={7}$|>{7}).*", path.read_text(encoding="utf-8"), re.MULTILINE) == []


def test_docs_index_lists_every_page():
    listed = set(re.findall(r"\]\(([\w.]+)\)", (ROOT / "docs/index.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}


# --- the test itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "clone/sites.py",
        "train/step.py:81",
        "tests/distributed/test_*.py",
        "docs/step.svg",
        "metrics.jsonl",
        "RUN/iter_NNNNNNN",
        "iter_0000500/",
        "sites.select",
        "Projections.pull_back",
        "Projections",
        "compose()",
        "--tensor-model-parallel-size",
        "--no-verify",
        "python tools/plan.py --gpus 64",
        "make demo",
    ],
)
def test_what_exists_is_found(text):
    assert missing(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "clone/sights.py",
        "mcore/clone_captures.py",
        "pruning/",
        "docs/step.png",
        "sites.choose",
        "Projections.pull_forth",
        "AttachLoss",
        "keep_results_in_process",
        "compose_and_pull()",
        "--tensor-parallel-size",
        "python tools/planner.py --gpus 64",
        "python tools/plan.py --gpu-count 64",
        "make coffee",
    ],
)
def test_what_does_not_exist_is_named(text):
    assert len(missing(text)) == 1
