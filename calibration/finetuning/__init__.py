# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of a compressed model against the loss of compression."""
