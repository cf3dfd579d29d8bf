"""What curvature costs, ours and other libraries', in units of a training step; the same as `laplace-ws bench curvature`.

python experiments/bench_curvature.py --config configs/bench_curvature.yaml --out docs/measured --docs docs/benchmarks.md
"""

from __future__ import annotations

import sys

from laplace_ws.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "curvature", *sys.argv[1:]]))
