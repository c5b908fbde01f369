# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench serve` in parts: settings -> servers in turn -> load and samples -> tables.

`settings` says what is asked for, `runner` starts each server and measures what is missing,
`client` runs vLLM's own benchmark client, `sampler` reads the server beside it, `rows` is what is
stored, `table` and `plots` are what people look at. `capacity` is arithmetic alone.
"""
