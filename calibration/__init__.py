"""Offline calibration: text -> moments -> bases -> ranks -> folded checkpoint."""
