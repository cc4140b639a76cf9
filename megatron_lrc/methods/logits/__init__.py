"""Distillation of logits alone, into a new student."""
