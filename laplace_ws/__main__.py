"""`python -m laplace_ws` is `laplace-ws`."""

from __future__ import annotations

import sys

from laplace_ws.cli import main

if __name__ == "__main__":
    sys.exit(main())
