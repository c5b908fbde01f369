"""`vllm-eigen bench serve` in parts: settings -> servers in turn -> load and samples -> tables.

`settings` says what is asked for, `visits` starts each server and remembers what is done, `client`
runs vLLM's own benchmark client, `sampler` reads the server beside it, `rows` is what is stored,
`table` and `plots` are what people look at.
"""
