"""Sheared-LLaMA: a model is pruned with learnt masks, then trained on."""
