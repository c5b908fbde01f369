# SPDX-License-Identifier: Apache-2.0
"""Offline calibration: text -> moments -> bases -> ranks -> folded checkpoint."""
