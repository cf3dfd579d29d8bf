"""What curvature costs, ours and other libraries', in units of a training step.

    python experiments/bench_curvature.py --config configs/bench_curvature.yaml --out docs/measured --docs docs/benchmarks.md
    python experiments/bench_curvature.py render docs/measured/bench_curvature.json --docs docs/benchmarks.md

The first measures, and writes JSON, tables and pictures into a folder, and the tables into a document; the second makes tables and
pictures anew from what was measured. The folder of the same name beside this file holds the parts.
"""

from __future__ import annotations

import sys

from laplace_ws.interrupts import quiet_imports

with quiet_imports("bench_curvature.py"):
    from bench_curvature.command import main

if __name__ == "__main__":
    sys.exit(main())
