"""Model-parallel pretraining of language models with neural memory, a differentiable cache and tree of thoughts."""

__version__ = "0.1.0"
