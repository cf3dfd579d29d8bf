"""Tuned prior precisions beside a sweep of fixed ones, over several seeds.

    python experiments/prior_sweep.py --config configs/prior_sweep.yaml

Each seed draws another subset of the images, another initialisation and another order of batches. Prints, for the tuned network and
for each fixed prior precision, mean and standard deviation over the seeds, and writes them as JSON beside the run folders.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

from study import read_config

from laplace_ws.experiment.config import RunConfig
from laplace_ws.experiment.run import run_experiment

SEEDS = (0, 1, 2)
FIGURES = ("log_marginal_likelihood", "test_nll", "test_accuracy", "test_ece")


def sweep(config: RunConfig) -> dict[str, dict[str, list[float]]]:
    """Every figure of every network, one entry a seed."""
    table: dict[str, dict[str, list[float]]] = {}
    for seed in SEEDS:
        run = dataclasses.replace(config, name=f"{config.name}-seed{seed}", seed=seed, report=False)
        _, result = run_experiment(run)
        models = {"tuned": result.tuned, **{f"fixed {k}": m for k, m in result.fixed.items()}}
        for name, model in models.items():
            row = table.setdefault(name, {figure: [] for figure in FIGURES})
            for figure in FIGURES:
                row[figure].append(getattr(model, figure))
    return table


def as_markdown(table: dict[str, dict[str, list[float]]]) -> str:
    """Mean ± standard deviation over the seeds."""
    lines = ["| | " + " | ".join(FIGURES) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for name, row in table.items():
        cells = [f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for v in row.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    config = read_config(RunConfig, __doc__)
    table = sweep(config)
    path = Path(config.out) / f"{config.name}.json"
    path.write_text(json.dumps({"seeds": SEEDS, "table": table}, indent=2) + "\n")
    print(as_markdown(table))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
