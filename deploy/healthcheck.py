"""The image's health check: asks /health of the server that is process 1, at the address that its command line says.

    python healthcheck.py [FILE]      FILE: its words, each ended by a NUL (default: /proc/1/cmdline)

Ready may be false for a while (loading, a rank that is started again); not answering at all is what is unhealthy, and
ranks that have been given up (503). Only the standard library: the image has nothing else for it.
"""

from __future__ import annotations

import ssl
import sys
import urllib.request
from pathlib import Path

DEFAULTS = {"--host": "127.0.0.1", "--port": "8000", "--tls-cert": ""}
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
SECONDS = 4


def health_url(words: list[str]) -> str:
    """Where a server started by these words answers: `--port 9000` and `--port=9000`, the last of several."""
    found = dict(DEFAULTS)
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in found:
            found[name] = value if equals else words[position + 1]
    host = EVERYWHERE.get(found["--host"], found["--host"])
    where = f"[{host}]" if ":" in host else host
    return f"{'https' if found['--tls-cert'] else 'http'}://{where}:{found['--port']}/health"


def main() -> None:
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "/proc/1/cmdline")
    url = health_url(file.read_text().split("\0"))
    # The certificate is for the name that others call the server by, not for this address.
    unchecked = ssl._create_unverified_context()
    # No proxy of the environment stands between this and its own server.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unchecked)
    )
    try:
        opener.open(url, timeout=SECONDS).close()
    except OSError as error:
        sys.exit(f"{url}: {error}")


if __name__ == "__main__":
    main()
