# SPDX-License-Identifier: Apache-2.0
"""Health check of the images: exit status 0 when the server's `/health` answers, 1 otherwise.

It asks the port of `EIGEN_PORT` on this host; `EIGEN_HEALTH_URL` names another address, e.g. one
with https. `EIGEN_HEALTH_CA` names the certificates to trust there. Without it the certificate of a
loopback address is not verified: it names the host that clients ask for, and the answer comes from
this host. Standard library only: it runs every few seconds.
"""

import os
import ssl
import sys
import urllib.parse
import urllib.request

SECONDS = 4.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main() -> int:
    """Ask once; returns the exit status."""
    port = os.environ.get("EIGEN_PORT") or "8000"
    url = os.environ.get("EIGEN_HEALTH_URL") or f"http://127.0.0.1:{port}/health"
    try:
        urllib.request.urlopen(url, timeout=SECONDS, context=_context(url)).close()
    except (OSError, ValueError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1
    return 0


def _context(url: str) -> ssl.SSLContext | None:
    """How to verify the server's certificate; None without https."""
    address = urllib.parse.urlsplit(url)
    if address.scheme != "https":
        return None
    authorities = os.environ.get("EIGEN_HEALTH_CA")
    context = ssl.create_default_context(cafile=authorities or None)
    if address.hostname in LOOPBACK:
        context.check_hostname = False
        if not authorities:
            context.verify_mode = ssl.CERT_NONE
    return context


if __name__ == "__main__":
    sys.exit(main())
