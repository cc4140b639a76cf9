"""How well a student clones before its first step: a run of no steps, in a process of its own."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_lrc.comparison.runner import environment, last_line
from megatron_lrc.config import Config, ConfigError
from megatron_lrc.train.jsonl import read_records

#: Of a validation's record.
SCORES = ("lm_loss", "teacher_lm_loss", "teacher_kl", "top1_agreement")


def flags_of_scores(config: Config, flags: Sequence[str]) -> list[str]:
    """A run's flags, of which scores are made. ConfigError where it would validate nothing, or random numbers."""
    if config.model.teacher is None:
        raise ConfigError("--score runs the teacher. Give --teacher DIR, with its weights.")
    data = config.data
    if not (data.data_path or data.valid_data_path) or config.logging.eval_iters == 0:
        raise ConfigError(
            "--score is a loss on held-out text. Give --data-path, or --train-data-path and --valid-data-path, and an "
            "--eval-iters above 0."
        )
    return [*flags, *([] if config.projection.init != "random" else ["--init", "ridge"])]


def score(flags: Sequence[str], processes: int) -> dict[str, float]:
    """SCORES of a run's first validation. ConfigError with its last line where it fails."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(launcher if processes > 1 else []), "megatron_lrc", "train", *flags]
    with tempfile.TemporaryDirectory(prefix="untrained-") as folder:
        log = Path(folder) / "log"
        with log.open("w") as file:
            run = [*command, "--train-iters", "0", "--save", f"{folder}/run"]
            done = subprocess.run(run, stdout=file, stderr=subprocess.STDOUT, env=environment(1))
        if done.returncode != 0:
            raise ConfigError(f"--score failed with {' '.join(flags)}: {last_line(log)}")
        record = list(read_records(Path(folder) / "run/validation.jsonl"))[-1]
    return {name: record[name] for name in SCORES}
