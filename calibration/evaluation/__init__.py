# SPDX-License-Identifier: Apache-2.0
"""Quality of a checkpoint against its base."""
