"""`lm`: pre-train language models, carry them over, and fine-tune them, in JAX."""

__version__ = "0.1.0"
