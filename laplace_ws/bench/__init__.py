"""What curvature costs, ours and other libraries', in units of a training step."""

from __future__ import annotations

from laplace_ws.bench.config import BenchConfig, BenchError, CurvesConfig, NetworkConfig, UpdatesConfig, check_config
from laplace_ws.bench.files import check_places, load_result, render, write_result
from laplace_ws.bench.run import run_bench
from laplace_ws.bench.tables import as_markdown

__all__ = [
    "BenchConfig",
    "BenchError",
    "CurvesConfig",
    "NetworkConfig",
    "UpdatesConfig",
    "as_markdown",
    "check_config",
    "check_places",
    "load_result",
    "render",
    "run_bench",
    "write_result",
]
