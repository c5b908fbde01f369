# SPDX-License-Identifier: Apache-2.0
"""Spending a byte budget over layers, keys and values."""
