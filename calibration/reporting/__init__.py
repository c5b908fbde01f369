# SPDX-License-Identifier: Apache-2.0
"""Plots and pages about checkpoints."""
