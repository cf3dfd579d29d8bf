"""A process of its own for some measurements: reads what to measure from standard input, writes a line of JSON for each.

python -m bench_curvature.worker < request.json
"""

from __future__ import annotations

import json
import os
import sys

import torch

from bench_curvature.config import BenchConfig, CurvesConfig, NetworkConfig, UpdatesConfig
from bench_curvature.measure import Item, measure
from laplace_ws.interrupts import end_with


def config_from(values: Item) -> BenchConfig:
    """The configuration from its JSON."""
    sections = {"network": NetworkConfig, "curves": CurvesConfig, "updates": UpdatesConfig}
    return BenchConfig(**values | {name: cls(**values[name]) for name, cls in sections.items()})


def main() -> None:
    """Measure what standard input asks for."""
    request = json.load(sys.stdin)
    end_with(request["parent"])
    config = config_from(request["config"])
    torch.set_num_threads(config.threads)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what a library prints must not come between the answers
        for item in request["items"]:
            print(json.dumps(measure(config, item)), file=answers, flush=True)


if __name__ == "__main__":
    main()
