# SPDX-License-Identifier: Apache-2.0
"""Triton attention kernels for GPUs."""
