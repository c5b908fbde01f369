# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on one GPU: checked, timed, and what they should take."""
