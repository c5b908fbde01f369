# SPDX-License-Identifier: Apache-2.0
"""What every room shares: errors, files, provenance, progress, signals, sizes; nothing heavy."""
