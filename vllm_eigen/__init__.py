"""vLLM plugin that serves language models with a low-rank paged KV cache (Eigen Attention)."""

__version__ = "0.1.0"
