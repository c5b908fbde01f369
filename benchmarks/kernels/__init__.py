# SPDX-License-Identifier: Apache-2.0
"""Attention kernels against vLLM's own."""
