# SPDX-License-Identifier: Apache-2.0
"""Subcommands of `vllm-eigen` that work offline; light modules, heavy imports only inside `run`."""
