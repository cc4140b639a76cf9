"""Ordinary training of one model by itself."""
