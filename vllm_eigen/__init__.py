"""vLLM plugin that serves language models with a low-rank paged KV cache (Eigen Attention).

Holds, in the order data flows: the checkpoint format (`checkpoint`, `families`), the plugin's
entry point (`plugin`), the models with replaced attention (`models`, `attention`, `projections`,
`mpt`), the attention back end (`backend`) and its `kernels`, the worker's report (`worker`), and
what every command shares (`cli`, `errors`, `files`, `provenance`).

May import torch and, through `vllm_internals` only, vLLM. Never imports `calibration` or `server`;
`checkpoint`, `families` and `cli` import neither torch nor vLLM.
"""

__version__ = "0.1.0"
