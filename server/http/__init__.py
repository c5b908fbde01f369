# SPDX-License-Identifier: Apache-2.0
"""What guards the HTTP side of the server: body limits, draining, the error shape."""
