# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a chat model and its compressed self, side by side.

`model` fetches it, `texts` and `questions.jsonl` are what it is judged on, `measure` asks the two
servers, `tables` prints; `run` is `make demo`.
"""
