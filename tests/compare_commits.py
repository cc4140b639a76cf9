"""Whether two checkouts of this repository compute and save the same, bit for bit: proof of a refactoring.

    python tests/compare_commits.py BEFORE AFTER [--cross] [--only SUBSTRING] [--keep DIR]

Each checkout trains the same small runs of every method on several layouts. What is compared: all fields of
metrics.jsonl and validation.jsonl but measured ones, and of every checkpoint the tensors, the optimizer's
settings and the counters; of runs on one rank the exported student too. With --cross, AFTER also goes on from
the checkpoints that BEFORE wrote in the middle of a run, and trains beside a teacher that BEFORE's
tools/convert_from_hf.py converted: the result has to be that of the run which BEFORE never interrupted. It
prints a line per comparison and a count at the end; the exit code is 1 if anything differs.

Nothing of the package is used here but its command line and file formats, so its modules may move between
the two. For each checkout one process loads torch, megatron-core and transformers, and forks every rank of
every run, which then runs `python -m megatron_lrc` or a tool as the command line does; one run is started by
examples/pretrain_lrc.sh instead. On 2 cores that do nothing else --cross takes about 8 minutes.
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

STEPS, SAVED_EVERY, CHANGED_AFTER = 5, 2, 3
SAVED = (2, 4, 5)
SECONDS_OF_A_RUN = 300

#: Differs between two runs that compute the same.
MEASURED = {"time", "step_seconds", "tokens_per_second", "tflops", "mfu", "memory_gib", "straggler"}
#: The step of a change in the middle of the run, which a later version may call otherwise.
CHANGES = {"opened_at", "pruned_at", "changed_at"}

COMMON = (
    f"--train-iters {STEPS} --save-interval {SAVED_EVERY} --eval-interval {SAVED_EVERY} --eval-iters 2"
    " --log-interval 1 --seq-length 16 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3"
    " --lr-decay-iters 20 --split 90,10,0 --weight-decay 0.01"
)
RIDGE = "--student-hidden-size 24 --init ridge --calibration-tokens 1024"
CLONE = "--student-hidden-size 24 --init-method-std 0.1"
OPENED = f"{CLONE} --open-after {CHANGED_AFTER}"
LOSSES = (
    "--kl-reduction sequence-sum --kl-temperature 2 --clone-attention-output teacher --detach-clone-targets"
    " --clone-terms q k o gate:0-2 down --loss-chunk-tokens 16"
)
OTHER_FLAGS = (
    "--recompute-granularity full --lr-decay-style cosine --lr-warmup-iters 2 --spike-factor 4 --async-save"
    " --keep-last 9 --reset-attention-mask --reset-position-ids --num-workers 1"
)
#: Method -> teacher and flags.
METHODS = {
    "lrc": ("llama", f"--teacher TEACHER {CLONE} --log-effective-rank"),
    "lrc-ridge": ("qwen", f"--teacher TEACHER {RIDGE}"),
    "lrc-flags": ("qwen", f"--teacher TEACHER {CLONE} {LOSSES} {OTHER_FLAGS}"),
    "opened": ("qwen", f"--teacher TEACHER {OPENED}"),
    "opened-all": ("llama", f"--teacher TEACHER {OPENED} --open-matrices all --open-lr 5e-4"),
    "ordinary": ("qwen", "--method ordinary --student TEACHER"),
    "ordinary-new": ("llama", "--method ordinary --teacher TEACHER --student-hidden-size 24"),
    "logits": ("llama", f"--method logits --teacher TEACHER {CLONE}"),
    "tinybert": ("qwen", f"--method tinybert --teacher TEACHER {CLONE}"),
    "sheared": (
        "qwen",
        "--method sheared --teacher TEACHER --student-hidden-size 28 --pruned-num-query-groups 2"
        f" --pruned-ffn-hidden-size 48 --prune-after {CHANGED_AFTER}",
    ),
}
#: Layout -> ranks and flags.
LAYOUTS = {
    "TP1": (1, ""),
    "TP2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "PP2x2": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "DP2": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "CP2": (2, "--context-parallel-size 2"),
    "TP2PP2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
}
DTYPES = {"fp32": "", "bf16": "--bf16", "fp16": "--fp16 --initial-loss-scale 256 --loss-scale-window 2"}
#: What every method runs on.
USUAL = [
    ("TP1", "fp32"),
    ("TP2", "fp32"),
    ("TP2", "bf16"),
    ("PP2", "fp32"),
    ("PP2x2", "fp32"),
    ("PP2x2", "bf16"),
]
#: With --cross: what AFTER goes on with.
CONTINUED = [("TP2", "bf16"), ("PP2x2", "fp32")]


@dataclass(frozen=True, slots=True)
class Case:
    """One run of each checkout."""

    method: str
    layout: str
    dtype: str
    is_by_script: bool = False

    def __str__(self) -> str:
        return f"{self.method} {self.layout} {self.dtype}{' by-script' if self.is_by_script else ''}"

    @property
    def folder(self) -> str:
        return str(self).replace(" ", "-")

    @property
    def ranks(self) -> int:
        return LAYOUTS[self.layout][0]

    def flags(self, material: Path, place: Path, run: Path, teacher: Path | None = None) -> list[str]:
        """place: of what one checkout writes, its index maps too."""
        model, flags = METHODS[self.method]
        whole = f"{flags} {COMMON} {LAYOUTS[self.layout][1]} {DTYPES[self.dtype]}"
        found = [str(teacher or material / model) if flag == "TEACHER" else flag for flag in whole.split()]
        data = ["--data-path", str(material / "counting"), "--data-cache-path", str(place / "cache")]
        return [*found, *data, "--save", str(run)]


def all_cases() -> Iterator[Case]:
    for method in METHODS:
        for layout, dtype in USUAL:
            if method != "lrc-flags" or "PP" not in layout:  # data workers on more stages take long
                yield Case(method, layout, dtype)
    for method in ("lrc", "opened", "ordinary", "sheared"):
        yield Case(method, "DP2", "bf16")
    for method in ("lrc", "ordinary"):
        yield Case(method, "CP2", "fp32")
        yield Case(method, "TP1", "fp16")
    yield Case("lrc", "TP2PP2", "fp32", is_by_script=True)


# ------------------------------------------------------------------------------------------ teachers and data


def write_material(folder: Path) -> None:
    """A Llama and a tied Qwen2 of 4 random layers; a dataset of noisy counting within their vocabulary."""
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "vocab_size": 151,
        "max_position_embeddings": 64,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    qwen = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=True))
    torch.manual_seed(5)
    for name, model in (("llama", llama), ("qwen", qwen)):
        for parameter_name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in parameter_name else 0.0, std=0.2)
        model.save_pretrained(folder / name)
    generator = numpy.random.default_rng(0)
    builder = IndexedDatasetBuilder(str(folder / "counting.bin"), dtype=numpy.uint16)
    for _ in range(200):
        steps = generator.choice([1, 1, 1, 2, 5], size=50)
        builder.add_document((generator.integers(64) + numpy.cumsum(steps)) % 64 + 80, [50])
    builder.finalize(str(folder / "counting.idx"))


# ----------------------------------------------------------------------------------------- running a checkout

OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Nothing of the package. Takes seconds, and starts no threads.
LOADED_ONCE = (
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)


class Checkout:
    """A checkout of the repository, and the process that its runs are forked from."""

    def __init__(self, root: Path, place: Path):
        self.root, self.place = root.resolve(), place
        assert (self.root / "megatron_lrc/__main__.py").is_file(), f"{root} is no checkout of megatron_lrc"
        place.mkdir()
        self._environment = {key: value for key, value in os.environ.items() if key not in OF_A_RANK} | {
            "PYTHONPATH": str(self.root),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve", str(self.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
            cwd=self.root,
        )

    def start(self, program: str, flags: list[str], ranks: int, log: Path) -> None:
        """Start `python -m megatron_lrc train` (program "train"), or a tool by its name, on so many ranks."""
        assert self._process.stdin
        job = {"program": program, "flags": flags, "ranks": ranks, "log": str(log), "port": free_port()}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        self._log = log

    def finish(self) -> str | None:
        """Await what was started; what failed, or None."""
        assert self._process.stdout
        answer = self._process.stdout.readline()
        assert answer, f"the process of {self.root} has ended"
        failed = json.loads(answer)
        return f"{failed} ({last_words(self._log)})" if failed else None

    def run_script(self, flags: list[str], ranks: int, log: Path) -> str | None:
        """The same by examples/pretrain_lrc.sh, in new processes; what failed, or None."""
        command = ["bash", str(self.root / "examples/pretrain_lrc.sh"), *flags]
        with open(log, "wb") as file:
            environment = self._environment | {"GPUS_PER_NODE": str(ranks)}
            code = subprocess.run(
                command, env=environment, cwd=self.root, stdout=file, stderr=file, timeout=SECONDS_OF_A_RUN
            ).returncode
        return f"exit code {code} ({last_words(log)})" if code else None

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    found = [line for line in lines if "rror" in line] or lines or [""]
    return f"{found[-1].strip()[:200]}; {log}"


def serve(root: Path) -> None:
    """Fork the ranks of each job that comes in on stdin; answer on stdout with what failed, or null."""
    import torch

    for name in LOADED_ONCE:
        importlib.import_module(name)
    torch.set_num_threads(1)
    sys.path.remove(str(Path(__file__).resolve().parent))  # these tests are not the checkout's
    spec = importlib.util.find_spec("megatron_lrc")
    assert spec and spec.origin and Path(spec.origin).is_relative_to(root), f"{spec} is not in {root}"
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        job = json.loads(line)
        processes = [context.Process(target=run_rank, args=(root, rank, job)) for rank in range(job["ranks"])]
        for process in processes:
            process.start()
        print(json.dumps(first_failure(processes)), flush=True)


def first_failure(processes: list[Any]) -> str | None:
    """End the others once one has failed, or time is over."""
    deadline, left = time.monotonic() + SECONDS_OF_A_RUN, list(processes)
    failed = None
    while left and not failed:
        done = wait([process.sentinel for process in left], timeout=max(deadline - time.monotonic(), 0))
        ended = [process for process in left if process.sentinel in done]
        failed = next((f"exit code {process.exitcode}" for process in ended if process.exitcode), None)
        failed = failed or (None if done else f"not done after {SECONDS_OF_A_RUN} s")
        left = [process for process in left if process not in ended]
    for process in left:
        process.join(5)  # it may have something to say about the other's end
        process.kill()
    for process in processes:
        process.join()
    return failed


def run_rank(root: Path, rank: int, job: dict[str, Any]) -> None:
    """As Python runs a command line, in a process that has loaded torch already."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    with open(job["log"], "ab", buffering=0) as log, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if job["program"] == "train":
        sys.argv = ["megatron_lrc", "train", *job["flags"]]
        runpy.run_module("megatron_lrc", run_name="__main__", alter_sys=True)
        return
    for name in OF_A_RANK:
        del os.environ[name]
    tool = root / "tools" / f"{job['program']}.py"
    sys.argv = [str(tool), *job["flags"]]
    sys.path.insert(0, str(tool.parent))
    runpy.run_path(str(tool), run_name="__main__")


# --------------------------------------------------------------------------------------------- comparing runs


def difference_of_runs(one: Path, other: Path, *, after: int = -1) -> str | None:
    """The first difference in what two run directories hold of later steps than `after`, in a few words."""
    for name, num_lines in (("metrics.jsonl", STEPS), ("validation.jsonl", len(SAVED) + 1)):
        lines, others = records(one / name), records(other / name)
        assert len(lines) == num_lines, f"{one / name} has {len(lines)} lines"
        lines = [line for line in lines if line["step"] > after]
        others = [line for line in others if line["step"] > after]
        if len(lines) != len(others):
            return f"{name}: {len(lines)} and {len(others)} records"
        for line, other_line in zip(lines, others, strict=True):
            place = f"{name} at step {line['step']}"
            if found := difference_of_values(line, other_line, place, leave_out=MEASURED):
                return found
    for step in SAVED:
        paths = (run / f"iter_{step:07d}" for run in (one, other))
        if step > after and (found := difference_of_checkpoints(*paths)):
            return f"checkpoint of step {step}: {found}"
    return None


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def difference_of_checkpoints(one: Path, other: Path) -> str | None:
    import torch

    from stored_tensors import bytes_of, read_objects, read_tensors

    tensors, others = read_tensors(one), read_tensors(other)
    assert len(tensors) > 20, f"{one} has {len(tensors)} tensors"
    if tensors.keys() != others.keys():
        return f"keys {sorted(tensors.keys() ^ others.keys())[:4]} are in one of them only"
    for key, tensor in tensors.items():
        found = others[key]
        if (tensor.dtype, tensor.shape) != (found.dtype, found.shape):
            return f"{key} is {tensor.dtype} {list(tensor.shape)} and {found.dtype} {list(found.shape)}"
        if bytes_of(tensor) != bytes_of(found):
            return f"{key}: {int(torch.count_nonzero(tensor != found))} of {tensor.numel()} values differ"
    if found := difference_of_values(read_objects(one), read_objects(other), "common.pt"):
        return found
    state, other_state = (json.loads((path / "run.json").read_text()) for path in (one, other))
    for section in ("state", "student_shape"):
        if found := difference_of_values(state[section], other_state[section], section, leave_out=CHANGES):
            return found
    return None


def difference_of_values(one: Any, other: Any, name: str, *, leave_out: Set[str] = frozenset()) -> str | None:
    """Of nested values. leave_out: keys at the outermost level."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys, other_keys = one.keys() - leave_out, other.keys() - leave_out
        if keys != other_keys:
            return f"{name}: keys {sorted(map(str, keys ^ other_keys))[:4]} are in one of them only"
        pairs = [(f"{name}: {key}", one[key], other[key]) for key in one if key in keys]
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = [(f"{name}[{place}]", *values) for place, values in enumerate(zip(one, other, strict=True))]
    else:
        return None if type(one) is type(other) and bool(one == other) else f"{name} {one!r} and {other!r}"
    return next(filter(None, (difference_of_values(a, b, inner) for inner, a, b in pairs)), None)


def difference_of_exports(one: Path, other: Path) -> str | None:
    for name in ("model.safetensors", "config.json"):
        if (one / name).read_bytes() != (other / name).read_bytes():
            return f"exported {name} differs"
    return None


# --------------------------------------------------------------------------------------------- the comparison


class Comparison:
    """before, after: the checkouts. Says what each comparison has found, and counts."""

    def __init__(self, before: Checkout, after: Checkout, material: Path):
        self.before, self.after, self.material = before, after, material
        self.count = self.equal = 0
        self._started = time.monotonic()

    def say(self, name: str, difference: str | None) -> None:
        self.count += 1
        self.equal += difference is None
        passed = time.monotonic() - self._started
        found = "equal" if difference is None else f"DIFFERENT: {difference}"
        print(f"{name:40} {found}  ({passed:.0f} s)", flush=True)

    def on_both(self, program: str, flags: dict[Checkout, list[str]], ranks: int, name: str) -> str | None:
        """Run side by side; the first failure."""
        for checkout in flags:
            checkout.start(program, flags[checkout], ranks, checkout.place / f"{name}.log")
        failures = [(checkout.root, checkout.finish()) for checkout in flags]
        return next((f"{root} failed: {failure}" for root, failure in failures if failure), None)

    def compare(self, case: Case) -> str | None:
        """Train one case in both checkouts; one rank's students are exported too."""
        runs = {checkout: checkout.place / case.folder for checkout in (self.before, self.after)}
        flags = {checkout: case.flags(self.material, checkout.place, run) for checkout, run in runs.items()}
        if case.is_by_script:
            for checkout in runs:
                log = checkout.place / f"{case.folder}.log"
                if failure := checkout.run_script(flags[checkout], case.ranks, log):
                    return f"{checkout.root} failed: {failure}"
        elif failure := self.on_both("train", flags, case.ranks, case.folder):
            return failure
        if found := difference_of_runs(*runs.values()):
            return found
        if case.ranks > 1:
            return None
        exports = {checkout: checkout.place / f"{case.folder}-exported" for checkout in runs}
        places = {checkout: ["--load", str(run), "--output"] for checkout, run in runs.items()}
        flags = {checkout: [*places[checkout], str(export)] for checkout, export in exports.items()}
        failure = self.on_both("convert_to_hf", flags, 1, f"{case.folder}-export")
        return failure or difference_of_exports(*exports.values())

    def go_on(self, case: Case, step: int) -> str | None:
        """`after` continues what `before` has written at a step."""
        whole, run = self.before.place / case.folder, self.after.place / f"{case.folder}-from-{step}"
        flags = [*case.flags(self.material, self.after.place, run), "--load", str(whole / f"iter_{step:07d}")]
        failure = self.on_both("train", {self.after: flags}, case.ranks, run.name)
        return failure or difference_of_runs(whole, run, after=step)

    def with_converted_teacher(self, case: Case) -> str | None:
        """`after` trains beside the teacher that `before` has converted."""
        model = METHODS[case.method][0]
        converted = self.before.place / f"{model}-converted"
        run = self.after.place / f"{case.folder}-converted"
        if not converted.exists():
            flags = ["--hf-model", str(self.material / model), "--output", str(converted)]
            if failure := self.on_both("convert_from_hf", {self.before: flags}, 1, converted.name):
                return failure
        flags = case.flags(self.material, self.after.place, run, teacher=converted)
        failure = self.on_both("train", {self.after: flags}, case.ranks, run.name)
        return failure or difference_of_runs(self.before.place / case.folder, run)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="Checkout of the old commit.")
    parser.add_argument("after", type=Path, metavar="AFTER", help="Checkout of the new commit.")
    parser.add_argument("--cross", action="store_true", help="AFTER also goes on with what BEFORE wrote.")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="Cases whose name has this in it.")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="New folder to work in, which stays.")
    flags = parser.parse_args(argv)
    cases = [case for case in all_cases() if flags.only in str(case)]
    assert cases, f"no case has {flags.only!r} in its name; they are: {', '.join(map(str, all_cases()))}"
    with tempfile.TemporaryDirectory() as temporary:
        work = flags.keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        return run_comparison(flags, cases, work.resolve())


def run_comparison(flags: argparse.Namespace, cases: list[Case], work: Path) -> int:
    (work / "material").mkdir()
    before, after = Checkout(flags.before, work / "before"), Checkout(flags.after, work / "after")
    write_material(work / "material")
    comparison = Comparison(before, after, work / "material")
    for case in cases:
        comparison.say(str(case), comparison.compare(case))
        if flags.cross and (case.layout, case.dtype) in CONTINUED:
            for step in SAVED[:-1]:
                comparison.say(f"{case} from step {step}", comparison.go_on(case, step))
            comparison.say(f"{case} converted teacher", comparison.with_converted_teacher(case))
    before.close()
    after.close()
    print(f"{comparison.equal} of {comparison.count} equal")
    return int(comparison.equal != comparison.count)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
    else:
        sys.exit(main())
