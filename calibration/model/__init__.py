# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face model and the text it reads."""
