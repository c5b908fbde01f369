# SPDX-License-Identifier: Apache-2.0
"""vLLM plugin that serves language models with a low-rank paged KV cache (Eigen Attention).

`checkpoint` defines the format, `kernels` compute attention over latents, `plugin` brings both into
vLLM. `calibration` makes checkpoints, `server` adds routes to vLLM's server, `benchmarks` measure;
these three are links to the folders of the same names. `common` and `cli` serve all of them. Who
may import whom stands in `pyproject.toml`.
"""

__version__ = "0.1.0"
