"""The settings of a run, section by section: each field is a command-line flag, with its default and its help.

`model.py` has what is trained, `run.py` how. `arguments.py` turns each field into a flag (`student_hidden_size` ->
`--student-hidden-size`) and a key of the YAML file; a field's `help` is what `--help` prints. Flags have Megatron-LM's
names wherever the concept exists there. A number's range stands beside it (`at_least`, `above`, `below`) and is
enforced by `validation.validate()`.
"""

from .model import CLONE_TERMS, TINYBERT_TERMS, LossConfig, ModelConfig, ProjectionConfig, PruningConfig
from .run import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
