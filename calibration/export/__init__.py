# SPDX-License-Identifier: Apache-2.0
"""From bases and ranks to a checkpoint on disk."""
