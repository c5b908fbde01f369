# SPDX-License-Identifier: Apache-2.0
"""KV-cache statistics of a running engine."""
