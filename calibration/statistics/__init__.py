# SPDX-License-Identifier: Apache-2.0
"""Second moments of queries, keys, values and attention outputs."""
