# SPDX-License-Identifier: Apache-2.0
"""What calibration takes: windows of text, seconds and memory."""
