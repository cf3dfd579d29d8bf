"""How much of laplace-torch's own test suite passes through `laplace_ws.compat.laplace_torch`.

    python experiments/peer_suite.py path/to/laplace-torch
    python experiments/peer_suite.py path/to/laplace-torch --select '[test_laplace.py, test_metrics.py]'

Takes a checkout, copies its tests and runs them with our module in the place of `laplace`, which need not be installed. Prints how many
pass, and which do not count and why; writes the same to `peer_suite.json`. The folder of the same name beside this file holds the parts.
"""

from __future__ import annotations

from peer_suite.command import main

if __name__ == "__main__":
    main(__doc__)
