"""Text to indexed datasets (`indexing`), the checks a run makes of them (`checks`), and micro-batches (`batches`).

Imports nothing on its own: the tools that only write datasets start without torch, transformers or megatron-core.
"""
