# SPDX-License-Identifier: Apache-2.0
"""The engine end to end."""
