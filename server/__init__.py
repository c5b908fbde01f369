# SPDX-License-Identifier: Apache-2.0
"""Routes that add KV-cache statistics to vLLM's OpenAI-compatible server.

Workers report their cache (`vllm_eigen.plugin.kv_layout`) -> `stats` -> `api`; `plugin` ties them
to vLLM's server, `launch` checks and starts it. Imports FastAPI, vLLM, and `vllm_eigen`'s
`common`, `checkpoint` and `plugin`; never `calibration`.
"""
