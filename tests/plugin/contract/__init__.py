# SPDX-License-Identifier: Apache-2.0
"""What the plugin relies on in vLLM, and how a release is checked for it without installing it."""
