"""Checkpoints on disk, without megatron-core: how they lie there, their sums and index, reading them in one process."""
