"""What online tuning costs, against what it brings: test NLL and evidence by share of batches, frequency, curvature, optimiser and budget.

    python experiments/budget_tradeoff.py --config configs/budget_tradeoff.yaml --train.data.root FOLDER

Each row is a network trained by plain SGD, in which the prior precisions are fixed at their start or tuned in one of many ways, all else
alike. Overhead is the CPU time of the tunings by that of the gradient steps; the last fit of the training is given apart. As each way
tunes by another approximation of the evidence, rows are compared by one: that of an exact K-FAC-expand fit to all training images, at
the prior precisions of the training and at those that it would choose itself. Prints mean and standard error over the seeds, and
writes them with a plot of overhead against test NLL. What each row and seed gave is kept in a file of its own and not measured again.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from study import read_config, write_result
from trust import Table, as_markdown

from laplace_ws import Laplace
from laplace_ws.data import ImageData, TensorLoader
from laplace_ws.experiment.config import RunConfig
from laplace_ws.experiment.evaluate import outputs
from laplace_ws.experiment.folder import Task, write_whole
from laplace_ws.experiment.records import TUNED
from laplace_ws.experiment.run import load_data, make_model, torch_settings
from laplace_ws.experiment.training import train_loader, training_options
from laplace_ws.experiment.workers import side_by_side
from laplace_ws.marglik import MarglikResult, prepare
from laplace_ws.metrics import evaluate_classification
from laplace_ws.report.style import dashed_style, drawing, legend_below

OFTEN = {"marglik_frequency": 5, "fit_fraction": 0.25, "keep": "best"}
ROWS: dict[str, dict[str, Any]] = {
    "fixed prior": {"n_hypersteps": 0},
    "all batches": {**OFTEN, "fit_fraction": 1.0},
    **{f"share {share:g}": {**OFTEN, "fit_fraction": share} for share in (0.5, 0.25, 0.1, 0.05)},
    **{f"frequency {frequency}": {**OFTEN, "marglik_frequency": frequency} for frequency in (1, 2)},
    **{f"curvature {name}": {**OFTEN, "curvature": name} for name in ("ef", "ggn_mc_rademacher", "ggn")},
    "last epoch": {**OFTEN, "fit_fraction": 0.1, "keep": "last"},
    "approximation expand": {**OFTEN, "kfac_approx": "expand"},
    **{f"optimiser {name}": {**OFTEN, "hyper_optimizer": name} for name in ("adam", "mackay")},
    **{f"budget {share:g}": {"curvature_budget": share} for share in (0.02, 0.05, 0.1, 0.2)},
}
"""By name, what a row changes of `train.marglik`. Where its name does not say so, the curvature is ggn_mc by reduce, the optimiser newton,
the share 0.25 and the frequency 5; so the row "share 0.25" stands for each of these. "last epoch" is "share 0.1" without
`keep="best"`, with which the others were measured."""

DIGITS = {
    "overhead [%]": (100.0, 1), "last fit [%]": (100.0, 1), "tunings": (1.0, 0),
    "test NLL [nats]": (1.0, 3), "test accuracy [%]": (100.0, 1),
    "log evidence [nats]": (1.0, 0), "at its own prior [nats]": (1.0, 0),
}  # fmt: skip


@dataclass(frozen=True)
class TradeoffConfig:
    """What is trained.

    Attributes:
        name: of the folder of the results, and of their files.
        seeds: one network each in every row: other images, initialisation and order of batches.
        rows: names of the rows to measure, of `ROWS`; all of them if not given.
        train: the training that all rows share.
        workers: rows that are measured side by side, each in a process of its own.
        out: folder of the results.
    """

    name: str = "budget_tradeoff"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    rows: list[str] | None = None
    train: RunConfig = field(default_factory=RunConfig)
    workers: int = 1
    out: str = "runs"

    @property
    def row_names(self) -> list[str]:
        """Of the rows to measure."""
        return list(ROWS) if self.rows is None else self.rows

    def run_of(self, row: str, seed: int) -> RunConfig:
        """The training of one row by one seed."""
        return replace(self.train, seed=seed, marglik=replace(self.train.marglik, **ROWS[row]))

    def file_of(self, row: str, seed: int) -> Path:
        """Where its figures are kept."""
        return Path(self.out) / self.name / f"{row.replace(' ', '-')}-seed{seed}.json"


def measure(run: RunConfig, path: Path) -> dict[str, float]:
    """Train one network and keep its figures, unless they are there.

    Raises:
        SystemExit: they are, and of other settings.
    """
    settings = json.loads(json.dumps(run.settings()))
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] != settings:
            sys.exit(
                f"error: '{path}' was measured with other settings; remove it, or choose another folder with --name"
            )
        return kept["figures"]
    data = load_data(run)
    model = make_model(run, data)
    with torch_settings(run.threads, run.seed):
        schedule, options = training_options(run, Task(TUNED))
        trainer = prepare(model, train_loader(run, data), run.likelihood, schedule, options, progress_bar=False)
        trainer.clock = time.process_time
        figures = figures_of(trainer.run(), data, run.data.batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"settings": settings, "figures": figures}, indent=2) + "\n")
    return figures


def figures_of(result: MarglikResult, data: ImageData, batch_size: int) -> dict[str, float]:
    """What a training cost, and what it gave."""
    model = result.model
    la = Laplace(model, "classification", curvature="ggn", kfac_approx="expand")
    la.fit(TensorLoader(data.x_train, data.y_train, batch_size=batch_size))
    la.prior_precision = torch.tensor([result.prior_precision[n] for n in la.parameter_names], dtype=torch.float64)
    evidence = la.log_marginal_likelihood().item()
    la.optimize_prior_precision("marglik", prior_structure="layerwise")
    scores = evaluate_classification(outputs(model, data.x_test), data.y_test, kind="logits")
    return {
        "overhead [%]": result.tuning_overhead,
        "last fit [%]": result.final_fit_overhead,
        "tunings": len(result.margliks),
        "test NLL [nats]": scores["nll"],
        "test accuracy [%]": scores["accuracy"],
        "log evidence [nats]": evidence,
        "at its own prior [nats]": la.log_marginal_likelihood().item(),
        "gradient seconds": result.gradient_seconds,
        "total seconds": time.process_time(),
    }


def plot(table: Table) -> bytes:
    """Overhead against test NLL, a colour and marker for each kind of row, as an SVG file."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for row in table:
        kinds[row if row in ("fixed prior", "all batches") else row.rpartition(" ")[0]].append(row)
    written: list[tuple[float, float]] = []
    with drawing(7.0, 5.0) as drawn:
        axes = drawn.axes
        for i, (kind, rows) in enumerate(kinds.items()):
            points = [(table[row]["overhead [%]"], table[row]["test NLL [nats]"]) for row in rows]
            means = torch.tensor([[sum(values) / len(values) for values in point] for point in points])
            errors = torch.tensor([[standard_error(values) for values in point] for point in points])
            style = dashed_style(i)
            axes.errorbar(
                *(100 * means[:, 0], means[:, 1]), xerr=100 * errors[:, 0], yerr=errors[:, 1],
                fmt=style.marker, color=style.color, label=kind, elinewidth=0.8,
            )  # fmt: skip
            for row, (overhead, nll) in zip(rows, means.tolist(), strict=True):
                if row == kind:
                    continue
                n_near = sum(abs(overhead - x) < 0.03 and abs(nll - y) < 0.01 for x, y in written)
                written.append((overhead, nll))
                axes.annotate(
                    row.rpartition(" ")[2],
                    (100 * overhead, nll),
                    (4, 4 - 9 * n_near),
                    textcoords="offset points",
                    fontsize=7,
                )
        axes.set(xlabel="tuning [% of the time of the gradient steps]", ylabel="test NLL [nats/image]")
        axes.set_title("What tuning costs and brings")
        legend_below(drawn.figure, axes)
    return drawn.svg


def standard_error(values: list[float]) -> float:
    """Of a mean; 0 for a single value, which has none."""
    return torch.tensor(values).std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0


def main() -> None:
    config = read_config(TradeoffConfig, __doc__)
    if unknown := [row for row in config.row_names if row not in ROWS]:
        sys.exit(f"error: rows names '{unknown[0]}', which is none of {', '.join(ROWS)}")
    cells = [(row, seed) for seed in config.seeds for row in config.row_names]
    calls = [(config.run_of(*cell), config.file_of(*cell)) for cell in cells]
    table: Table = {row: defaultdict(list) for row in config.row_names}
    for (row, seed), figures in zip(cells, side_by_side(measure, calls, config.workers), strict=True):
        print(f"{row}, seed {seed}: test NLL {figures['test NLL [nats]']:.3f}", flush=True)
        for name, value in figures.items():
            table[row][name].append(value)
    print("\n" + as_markdown(table, DIGITS))
    path = write_result(config, config.name, table)
    path.with_suffix(".svg").write_bytes(plot(table))


if __name__ == "__main__":
    main()
