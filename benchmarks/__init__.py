# SPDX-License-Identifier: Apache-2.0
"""Measurements, all of them subcommands of `vllm-eigen bench`.

`kernels` times attention calls, `engine` decodes in vLLM, `serving` puts load on servers, `soak`
holds a load for long, `quality` measures what compression costs; `lib` is what they share and
`results/` holds committed results with their provenance. May import every other room; none imports
this one.
"""
