# SPDX-License-Identifier: Apache-2.0
"""Whether the installed vLLM serves a checkpoint as it is meant: logits, capacity, features."""
