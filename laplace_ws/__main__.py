"""`laplace-ws`, which is also `python -m laplace_ws`."""

from __future__ import annotations

import sys

from laplace_ws.interrupts import quiet_imports


def main() -> int:
    """Import the command and run it; returns the exit status."""
    with quiet_imports("laplace-ws"):
        from laplace_ws import cli
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
