"""Health check of the images: exit status 0 when the server's `/health` answers, 1 otherwise.

It asks the port of `EIGEN_PORT` on this host; `EIGEN_HEALTH_URL` names another address, e.g. one
with https. Standard library only: it runs every few seconds.
"""

import os
import sys
import urllib.request

SECONDS = 4.0


def main() -> int:
    """Ask once; returns the exit status."""
    port = os.environ.get("EIGEN_PORT") or "8000"
    url = os.environ.get("EIGEN_HEALTH_URL") or f"http://127.0.0.1:{port}/health"
    try:
        urllib.request.urlopen(url, timeout=SECONDS).close()
    except (OSError, ValueError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
