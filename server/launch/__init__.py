# SPDX-License-Identifier: Apache-2.0
"""Before and around a server start: checks, capacity estimates, subprocesses."""
