"""TinyBERT's losses between layers, beside LM and KL."""
