"""Megatron-style pretraining of Low-Rank Clone students (arXiv 2505.12781). See ARCHITECTURE.md for the map."""

__version__ = "0.1.0"
