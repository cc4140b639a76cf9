"""The README's four steps as a user types them, on a tiny teacher: text, training in two processes, resume, export."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import ROOT, run
from hf_teachers import write_llama
from tiny_data import make_texts, write_jsonl
from tools_path import convert_to_hf


@pytest.mark.distributed
def test_text_to_exported_student_through_the_command_line(tmp_path, capsys):
    teacher, runs = tmp_path / "teacher", tmp_path / "run"
    write_llama(teacher)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_texts(300))
    preprocess = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", corpus, "--output-prefix"]
    run(*preprocess, str(tmp_path / "corpus"), "--tokenizer-model", str(teacher), "--append-eod")

    flags = f"--teacher {teacher} --student-hidden-size 20 --init-method-std 0.1 --save {runs} --log-interval 1"
    flags += f" --data-path {tmp_path}/corpus_text_document --split 90,10,0 --eval-iters 1"
    flags += " --seq-length 32 --global-batch-size 4 --pipeline-model-parallel-size 2"
    script = ["bash", str(ROOT / "examples/pretrain_lrc.sh"), *flags.split()]
    first = run(*script, "--train-iters", "2", GPUS_PER_NODE="2")
    assert "step 2/2" in first and "saved" in first
    assert "\ntraining: 256 tokens in 2 steps of 128 tokens\n" in first  # on CPU no hours
    assert first.count("next: ") == 1 and f"--load {runs}" in first.splitlines()[-1]  # of one rank
    second = run(*script, "--train-iters", "4", "--load", str(runs), GPUS_PER_NODE="2")
    assert "at step 2" in second and "step 3/4" in second and "step 2/4" not in second
    steps = [json.loads(line)["step"] for line in (runs / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert any((runs / "tensorboard").iterdir()) and (runs / "config.yaml").is_file()

    tokenizer_file = teacher / "tokenizer.json"
    unchanged = tokenizer_file.read_text()
    assert '"use_regex": true' in unchanged
    tokenizer_file.write_text(unchanged.replace('"use_regex": true', '"use_regex": false'))
    assert convert_to_hf(["--load", str(runs), "--output", str(tmp_path / "student")]) == 2
    assert "is not the one that the training data was made with" in capsys.readouterr().err
    tokenizer_file.write_text(unchanged)
    convert = [sys.executable, str(ROOT / "tools/convert_to_hf.py"), "--load", str(runs), "--save-projections"]
    run(*convert, "--output", str(tmp_path / "student"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert (model.config.hidden_size, model.config.head_dim, model.config.num_hidden_layers) == (20, 16, 2)
    prompt = tokenizer("a small language model", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] == prompt["input_ids"].shape[1] + 5 or generated[0, -1] == tokenizer.eos_token_id
    assert torch.isfinite(model(**prompt).logits).all()
    card = (tmp_path / "student/README.md").read_text()
    assert "| lm loss, held out | " in card and "--init-method-std 0.1" in card and str(tmp_path) not in card

    # and back again: the student is the teacher of the next clone
    chain = f"--teacher {tmp_path}/student --student-hidden-size 12 --save {tmp_path}/next --train-iters 2"
    chain += f" --data-path {tmp_path}/corpus_text_document --split 90,10,0 --eval-iters 1 --seq-length 32"
    chain += " --global-batch-size 4 --peak-tflops 0.001"
    trained = run(sys.executable, "-m", "megatron_lrc", "train", *chain.split())
    assert "step 2/2" in trained and "; under a minute at 35% of the peak (assumed)" in trained
    run("bash", "-c", trained.rpartition("next: ")[2])  # as a user pastes it
    assert (tmp_path / "next/report.html").is_file()
    grandchild = AutoModelForCausalLM.from_pretrained(tmp_path / "next-hf")
    assert (grandchild.config.hidden_size, grandchild.config.head_dim) == (12, 16)
