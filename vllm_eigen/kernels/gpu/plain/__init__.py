# SPDX-License-Identifier: Apache-2.0
"""Caches of numbers: attention, reconstruction of keys, cache write."""
