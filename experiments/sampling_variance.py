"""Spread of the sampled GGN, one random column per example: labels drawn from the model, beside random signs of the exact columns.

    python experiments/sampling_variance.py --config configs/sampling_variance.yaml

Trains a LeNet on a subset of Fashion-MNIST, and on the way, at some epochs, takes the Kronecker factors by both estimators over and over,
and the exact ones once. Both cost one backward pass. Prints and writes, for each epoch, the error of the gradient factors (relative, in
the Frobenius norm, root mean square over the draws), and mean and standard deviation of the log determinant of the posterior precision
less its exact value, in nats.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from study import read_config, write_result
from torch import Tensor, nn
from tqdm import tqdm

from laplace_ws import kron_factors
from laplace_ws.data import load_dataset
from laplace_ws.matrices import Kron
from laplace_ws.models import LeNet

ESTIMATORS = ("ggn_mc", "ggn_mc_rademacher")


@dataclass(frozen=True)
class VarianceConfig:
    """What to train and how often to draw.

    Attributes:
        dataset: name of the data.
        n_train: training images.
        batch_size: of training.
        lr: step size of Adam.
        epochs: after how many epochs the estimators are compared, in ascending order.
        n_draws: draws of each estimator.
        prior_precision: δ of the posterior precision H + δ.
        threads: of torch.
        seed: of data, network and draws.
        out: folder of the results.
    """

    dataset: str = "fashion-mnist-subset"
    n_train: int = 1000
    batch_size: int = 100
    lr: float = 1e-3
    epochs: tuple[int, ...] = (0, 5, 20, 60)
    n_draws: int = 20
    prior_precision: float = 1.0
    threads: int = 1
    seed: int = 0
    out: str = "runs"


def trained(config: VarianceConfig, x: Tensor, y: Tensor, n_classes: int) -> Iterator[tuple[int, nn.Module]]:
    """The network after each of the epochs."""
    torch.manual_seed(config.seed)
    model = LeNet(x.shape[1], n_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    for epoch in range(config.epochs[-1] + 1):
        if epoch in config.epochs:
            yield epoch, model
        for batch in torch.randperm(len(x)).split(config.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def compare(config: VarianceConfig, model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """Figures of each estimator at the present weights."""
    scale, delta = torch.tensor(1.0), torch.tensor(config.prior_precision)
    exact = kron_factors(model, "classification", data)
    log_det = exact.log_det(scale, delta).item()
    figures = {}
    for estimator in ESTIMATORS:
        generator = torch.Generator().manual_seed(config.seed)
        draws = [
            kron_factors(model, "classification", data, curvature=estimator, generator=generator)
            for _ in range(config.n_draws)
        ]
        log_dets = [draw.log_det(scale, delta).item() - log_det for draw in draws]
        figures[estimator] = {
            "relative_error": statistics.fmean(relative_error(draw, exact) ** 2 for draw in draws) ** 0.5,
            "log_det_bias": statistics.fmean(log_dets),
            "log_det_std": statistics.stdev(log_dets),
        }
    return figures


def relative_error(draw: Kron, exact: Kron) -> float:
    """‖B − B*‖/‖B*‖ over the gradient factors of all parameters together."""
    difference = sum((draw[name].B - block.B).square().sum() for name, block in exact.items())
    return float(difference / sum(block.B.square().sum() for block in exact.values())) ** 0.5


def as_markdown(rows: list[dict]) -> str:
    """The table that is printed."""
    lines = [
        "| epochs | training NLL | relative error: labels | signs | log det − exact: labels | signs |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        labels, signs = (row[name] for name in ESTIMATORS)
        log_dets = [f"{f['log_det_bias']:.1f} ± {f['log_det_std']:.1f}" for f in (labels, signs)]
        errors = [f"{f['relative_error']:.3f}" for f in (labels, signs)]
        lines.append(f"| {row['epoch']} | {row['train_nll']:.3f} | {' | '.join(errors)} | {' | '.join(log_dets)} |")
    return "\n".join(lines)


def run(config: VarianceConfig) -> list[dict]:
    """One row for each of the epochs."""
    images = load_dataset(config.dataset, n_train=config.n_train, seed=config.seed)
    x, y = images.x_train, images.y_train
    data = list(zip(x.split(config.batch_size), y.split(config.batch_size), strict=True))
    rows = []
    for epoch, model in tqdm(trained(config, x, y, images.n_classes), total=len(config.epochs), disable=None):
        with torch.no_grad():
            nll = F.cross_entropy(model(x), y).item()
        rows.append({"epoch": epoch, "train_nll": nll, **compare(config, model, data)})
    return rows


def main() -> None:
    config = read_config(VarianceConfig, __doc__)
    if config.n_draws < 2:
        raise SystemExit(f"n_draws={config.n_draws} must be at least 2")
    torch.set_num_threads(config.threads)
    rows = run(config)
    print(as_markdown(rows))
    write_result(config, "sampling_variance", rows)


if __name__ == "__main__":
    main()
