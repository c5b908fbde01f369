"""Routes that add KV-cache figures to vLLM's OpenAI-compatible server.

Holds: the `serve` command, the endpoint plugin, the figures and their schemas. May import
`vllm_eigen`, FastAPI and vLLM's public surface; never `calibration`.
"""
