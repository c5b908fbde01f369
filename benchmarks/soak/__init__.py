# SPDX-License-Identifier: Apache-2.0
"""A long mixed load on one server, and what must hold after it."""
