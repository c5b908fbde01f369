# SPDX-License-Identifier: Apache-2.0
"""What compression costs in quality."""
