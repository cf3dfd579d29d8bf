"""What the Laplace predictive brings on UCI regression tables, over random splits.

    python experiments/uci_regression.py --config configs/uci_regression.yaml --folder path/to/tables

For each table and split trains a small perceptron while prior precisions and observation noise tune themselves by the marginal
likelihood, and predicts the tenth of the rows that was put aside: by the network alone with the tuned noise (MAP), and by the closed-form
predictive of the Laplace posterior, whose variance adds that of the weights. Prints test log-likelihood and RMSE, in the targets' own
units, as mean and standard error over the splits.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from study import read_config, write_result
from torch import Tensor

from laplace_ws import marglik_training
from laplace_ws.data import TensorLoader, UciSplit, load_uci
from laplace_ws.models import MLP
from laplace_ws.posterior import Laplace

FIGURES = ("map_log_likelihood", "laplace_log_likelihood", "rmse")


@dataclass(frozen=True)
class UciConfig:
    """What is trained.

    Attributes:
        folder: of the tables, one text file each, its last column the target.
        tables: their names, without ".txt".
        n_splits: random splits of each.
        hidden: units of the one hidden layer.
        activation: of these.
        hessian_structure: of the posterior.
        prior_structure: which weights share a prior precision.
        prior_prec_init: of these, at the start.
        n_epochs: of training, fewer where these are more than n_steps gradient steps.
        n_steps: most gradient steps of a training.
        batch_size: of training.
        lr: of Adam, at the start.
        threads: of torch.
        seed: of splits, weights and batches.
        out: folder of the results.
    """

    folder: str
    tables: list[str] = field(
        default_factory=lambda: [
            "yacht",
            "bostonHousing",
            "concrete",
            "energy",
            "wine-quality-red",
            "kin8nm",
            "power-plant",
        ]
    )
    n_splits: int = 10
    hidden: int = 50
    activation: str = "tanh"
    hessian_structure: str = "kron"
    prior_structure: str = "layerwise"
    prior_prec_init: float = 1.0
    n_epochs: int = 300
    n_steps: int = 4_000
    batch_size: int = 64
    lr: float = 0.01
    threads: int = 1
    seed: int = 0
    out: str = "runs"


def run(config: UciConfig) -> list[dict[str, Any]]:
    """One entry a table: every figure as a list over the splits."""
    rows = []
    for table in config.tables:
        splits = [one_split(config, table, split) for split in range(config.n_splits)]
        row: dict[str, Any] = {"table": table, "n": splits[0]["n"]}
        row |= {figure: [split[figure] for split in splits] for figure in (*FIGURES, "sigma_noise")}
        rows.append(row)
        print(as_markdown([row]).splitlines()[-1], flush=True)
    return rows


def one_split(config: UciConfig, table: str, split: int) -> dict[str, float]:
    """Train on a split and score both predictives on its test part."""
    data = load_uci(Path(config.folder) / f"{table}.txt", split, config.seed)
    torch.manual_seed(config.seed + split)
    model = MLP(data.x_train.shape[1], [config.hidden], 1, config.activation)
    loader = TensorLoader(
        data.x_train, data.y_train, batch_size=config.batch_size, shuffle=True, seed=config.seed + split
    )
    n_epochs = max(1, min(config.n_epochs, config.n_steps // len(loader)))
    la = marglik_training(
        model,
        loader,
        "regression",
        hessian_structure=config.hessian_structure,
        curvature="ggn",
        optimizer_cls=torch.optim.Adam,
        optimizer_kwargs={"lr": config.lr},
        n_epochs=n_epochs,
        n_epochs_burnin=n_epochs // 10,
        marglik_frequency=max(1, n_epochs // 60),
        fit_fraction=1.0,
        keep="best",  # as docs/results.md has it
        hyper_optimizer="newton",
        prior_structure=config.prior_structure,
        prior_prec_init=config.prior_prec_init,
        progress_bar=False,
    ).la
    return {"n": len(data.y_train) + len(data.y_test), **scores(la, data)}


def scores(la: Laplace, data: UciSplit) -> dict[str, float]:
    """Test log-likelihood per example in nats, RMSE and noise, all in the targets' own units."""
    mean, covariance = la(data.x_test, observation_noise=True)
    mean, variance = mean.double(), covariance[..., 0].double()
    noise = la.sigma_noise.square().expand_as(variance)
    shift = math.log(data.target_std)
    return {
        "map_log_likelihood": gaussian_log_density(data.y_test, mean, noise).mean().item() - shift,
        "laplace_log_likelihood": gaussian_log_density(data.y_test, mean, variance).mean().item() - shift,
        "rmse": data.target_std * (data.y_test - mean).square().mean().sqrt().item(),
        "sigma_noise": data.target_std * la.sigma_noise.item(),
    }


def gaussian_log_density(
    y: Float[Tensor, "N 1"], mean: Float[Tensor, "N 1"], variance: Float[Tensor, "N 1"]
) -> Float[Tensor, "N 1"]:
    """log N(y; mean, variance)."""
    return torch.distributions.Normal(mean, variance.sqrt()).log_prob(y.double())


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Mean ± standard error over the splits."""
    titles = ("table", "rows", "MAP log-likelihood [nats]", "Laplace log-likelihood [nats]", "RMSE")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [mean_and_error(row[figure]) for figure in FIGURES]
        lines.append(f"| {row['table']} | {row['n']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_and_error(values: Sequence[float]) -> str:
    """Mean ± standard error; the mean alone of a single value."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def main() -> None:
    config = read_config(UciConfig, __doc__)
    torch.set_num_threads(config.threads)
    rows = run(config)
    print("\n" + as_markdown(rows))
    write_result(config, "uci_regression", rows)


if __name__ == "__main__":
    main()
