# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin; the only room of this package that imports vLLM."""
