"""Compose a student, train it for ten steps, export it, and load it, all from Python.

    python examples/from_python.py TEACHER DATA OUTPUT

TEACHER: a Hugging Face directory. DATA: the prefix of an indexed dataset (tools/preprocess_data.py). OUTPUT: a folder
for the run and the student.
"""

import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from megatron_lrc import api


def main(teacher: str, data: str, output: str) -> None:
    config = api.configure(
        preset="recommended",
        teacher=teacher,
        student_hidden_size=AutoConfig.from_pretrained(teacher).hidden_size // 2,
        data_path=[data],
        split="90,10,0",
        seq_length=64,
        micro_batch_size=4,
        global_batch_size=4,
        train_iters=10,
        log_interval=1,
        eval_iters=4,
        calibration_tokens=2048,
        save=Path(output) / "run",
    )
    untrained = api.compose(config)
    print(f"composed: {untrained.num_parameters() / 1e6:.1f}M parameters")

    run = api.train(config)
    first, last = run.validations[0], run.validations[-1]
    teachers = last["teacher_lm_loss"]
    print(f"held-out LM loss {first['lm_loss']:.3f} -> {last['lm_loss']:.3f}, the teacher's {teachers:.3f}")

    student = AutoModelForCausalLM.from_pretrained(api.export(run, Path(output) / "student"))
    print(f"exported: {type(student).__name__} of hidden size {student.config.hidden_size}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
