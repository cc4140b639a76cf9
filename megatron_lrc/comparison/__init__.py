"""Contestants trained on equal tokens and data, and what came of it: `tools/compare_methods.py`."""
