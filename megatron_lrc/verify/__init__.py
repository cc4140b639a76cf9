"""Whether two models compute the same: any pair of Hugging Face directories and checkpoints of ours."""
