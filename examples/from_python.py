"""Compose a student, train it for ten steps, and export it, all from Python.

    python examples/from_python.py TEACHER DATA WIDTH OUTPUT

TEACHER: a Hugging Face directory. DATA: the prefix of an indexed dataset (tools/preprocess_data.py). WIDTH: the
student's hidden size. OUTPUT: a folder for the run and the student.
"""

import sys
from pathlib import Path

from megatron_lrc import api


def main(teacher: str, data: str, width: str, output: str) -> None:
    config = api.configure(
        preset="recommended",
        teacher=teacher,
        student_hidden_size=int(width),
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
    student = api.compose(config)
    print(f"composed: {type(student).__name__}, {student.num_parameters():,} parameters")

    run = api.train(config)
    first, last = run.validations[0], run.validations[-1]
    teachers = last["teacher_lm_loss"]
    print(f"held-out LM loss {first['lm_loss']:.3f} -> {last['lm_loss']:.3f}, the teacher's {teachers:.3f}")

    directory = api.export(run, Path(output) / "student")
    print(f"exported: transformers' AutoModelForCausalLM loads {directory}")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
