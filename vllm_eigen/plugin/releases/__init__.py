# SPDX-License-Identifier: Apache-2.0
"""What stands elsewhere in one release of vLLM than in another: a module for each."""
