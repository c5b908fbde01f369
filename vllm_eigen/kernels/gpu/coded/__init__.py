# SPDX-License-Identifier: Apache-2.0
"""Caches of codes: their order in a block, attention, reconstruction of keys, cache write."""
