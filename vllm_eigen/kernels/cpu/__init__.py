# SPDX-License-Identifier: Apache-2.0
"""C++ attention kernels for CPUs."""
