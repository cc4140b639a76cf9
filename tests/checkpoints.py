"""A run directory without a training: what `open_checkpoint` reads, written from given projections and gains."""

import warnings
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_lrc.checkpoints.layout import NORMS, PROJECTIONS
from megatron_lrc.checkpoints.run_directory import RunState, checkpoint_path, partial_path, publish
from megatron_lrc.config import Config
from megatron_lrc.hf.families import TeacherDescription
from megatron_lrc.hf.teacher import TeacherReader
from megatron_lrc.methods import method_of


def write_run(
    run: Path,
    teacher: TeacherDescription,
    projections: dict[str, Tensor],
    norms: dict[str, Tensor],
    *,
    epsilon: float | None = None,
    train_iters: int | None = None,
) -> Path:
    """RUN/iter_0000003 of a student with these projections [D, d] and gains [d]; the checkpoint's path. epsilon: of its
    norms, if not the teacher's. train_iters: the run's steps, if it has a budget."""
    config = Config()
    config.training.train_iters = train_iters
    config.model.student_norm_epsilon = epsilon
    config.model.teacher, config.model.student_hidden_size = str(teacher.directory), len(norms["final"])
    config.model.untie_embeddings_and_output_weights = "lm_head" in projections
    state = RunState(step=3, tokens=4096, teacher_fingerprint=TeacherReader(teacher).fingerprint())
    path = checkpoint_path(run, state.step)
    partial = partial_path(path, "0")
    tensors = {PROJECTIONS + name: tensor for name, tensor in projections.items()}
    tensors |= {NORMS + name: tensor for name, tensor in norms.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(tensors, storage_writer=FileSystemWriter(partial), no_dist=True)
    publish(partial, path, state, config, method_of(config).student_shape(teacher.shape), {})
    return path
