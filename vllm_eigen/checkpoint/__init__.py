# SPDX-License-Identifier: Apache-2.0
"""The Eigen checkpoint format and the model families it covers; imports neither torch nor vLLM."""
