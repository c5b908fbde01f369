# SPDX-License-Identifier: Apache-2.0
"""Codes of a layer's latents: bases, steps and widths from the samples of the gradient pass."""
