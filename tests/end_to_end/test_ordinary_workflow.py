"""A chain through the command line: teacher -> clone -> ordinary training of it -> teacher of the next clone."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from command_line import ROOT, run
from hf_teachers import write_llama
from megatron_lrc.config import parse_config
from megatron_lrc.data.datasets import build_datasets
from tiny_data import make_texts, write_jsonl
from tools_path import tool_main

evaluate = tool_main("evaluate")

EVAL_SEQUENCES = 2 * 4


def held_out(run_directory: Path) -> list[float]:
    lines = (run_directory / "validation.jsonl").read_text().splitlines()
    return [json.loads(line)["lm_loss"] for line in lines]


def loss_in_transformers(model: Path, flags: list[str]) -> float:
    """LM loss on the sequences that a run with these flags validates on."""
    config = parse_config(flags).resolved(1)
    _, valid = build_datasets(config, step=0, consumed_samples=0)
    assert valid is not None
    samples = [valid[index] for index in range(EVAL_SEQUENCES)]
    tokens, labels, mask = (
        torch.stack([torch.as_tensor(sample[name]) for sample in samples]) for name in ("tokens", "labels", "loss_mask")
    )
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits
    per_token = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return ((per_token * mask).sum() / mask.sum()).item()


@pytest.mark.slow
@pytest.mark.distributed
def test_an_exported_clone_is_trained_on_by_itself_and_becomes_a_teacher(tmp_path):
    teacher, data = tmp_path / "teacher", str(tmp_path / "corpus")
    write_llama(teacher, is_tied=True)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_texts(300))
    preprocess = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", corpus, "--output-prefix", data]
    run(*preprocess, "--tokenizer-model", str(teacher), "--append-eod")

    common = f"--data-path {data}_text_document --split 80,20,0 --eval-iters 2 --seq-length 32 --log-interval 1"
    common += " --global-batch-size 4 --micro-batch-size 2 --train-iters 2 --lr 1e-3"

    def train(name: str, flags: str) -> list[str]:
        given = [*flags.split(), *common.split(), "--save", str(tmp_path / name)]
        printed = run(sys.executable, "-m", "megatron_lrc", "train", *given)
        assert "step 2/2" in printed
        return given

    def export(name: str, *flags: str) -> Path:
        output = tmp_path / f"{name}-hf"
        convert = [sys.executable, str(ROOT / "tools/convert_to_hf.py"), "--load", str(tmp_path / name)]
        run(*convert, "--output", str(output), *flags)
        return output

    train("clone", f"--teacher {teacher} --student-hidden-size 20 --init-method-std 0.1")
    clone = export("clone")

    flags = train("trained", f"--method ordinary --student {clone}")
    before, after = held_out(tmp_path / "trained")
    assert before == pytest.approx(held_out(tmp_path / "clone")[-1], rel=1e-5)
    assert before == pytest.approx(loss_in_transformers(clone, flags), rel=1e-5)
    trained = export("trained")
    assert after != before and after == pytest.approx(loss_in_transformers(trained, flags), rel=1e-5)
    card = (trained / "README.md").read_text()
    assert "by the method `ordinary`" in card and "from the weights of `clone-hf`" in card
    verified = run(sys.executable, str(ROOT / "tools/verify_model.py"), str(tmp_path / "trained"), str(trained))
    assert "The models agree" in verified
    text = ["--data-path", f"{data}_text_document", "--split", "80,20,0", "--seq-length", "32"]
    output, figures = tmp_path / "figures.json", []
    for model in (tmp_path / "trained", trained):  # compared with a teacher that is not what it was trained from
        assert evaluate([str(model), *text, "--teacher", str(teacher), "--output", str(output)]) == 0
        figures.append(json.loads(output.read_text())["heldout"]["figures"])
    assert figures[0] == figures[1] and figures[0][f"{data}_text_document"]["kl"] > 0
    run(sys.executable, str(ROOT / "tools/report.py"), str(tmp_path / "trained"))
    assert (tmp_path / "trained" / "report.html").is_file()

    train("next", f"--teacher {trained} --student-hidden-size 12")
    assert held_out(tmp_path / "next")

    # the form that convert_from_hf.py writes is as good a start, and the model may have moved when it is exported
    convert = [sys.executable, str(ROOT / "tools/convert_from_hf.py"), "--hf-model", str(clone)]
    run(*convert, "--output", str(tmp_path / "converted"))
    train("from-converted", f"--method ordinary --student {tmp_path}/converted")
    assert held_out(tmp_path / "from-converted") == [before, after]
    shutil.move(tmp_path / "converted", tmp_path / "moved")
    again = export("from-converted", "--teacher", str(tmp_path / "moved"))
    tokens = torch.arange(300)[None]
    logits = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (again, trained)]
    assert torch.equal(*logits)

    # and the baseline from scratch, in the same shape
    train("baseline", f"--method ordinary --teacher {teacher} --student-hidden-size 20")
    assert AutoModelForCausalLM.from_pretrained(export("baseline")).config.hidden_size == 20
