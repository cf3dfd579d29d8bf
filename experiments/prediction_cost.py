"""Time and memory of predictions by the number of images, ours and laplace-torch's.

    python experiments/prediction_cost.py --config configs/prediction_cost.yaml

The posterior predictive of a classifier (linearised, probit) on random images, from posteriors fitted to the same images. Each row is the
median of several predictions after a first one, in CPU time, and the most memory that tensors take during one, above what was held
before; laplace-torch (extra `bench`) only up to a number of images, as its cost grows with the square. Prints a table; writes JSON.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from bench_curvature.meter import peak_bytes, seconds_of
from study import read_config, write_result
from torch import Tensor, nn

from laplace_ws import Laplace
from laplace_ws.models import build_model


@dataclass(frozen=True)
class CostConfig:
    """What is predicted, and by whom.

    Attributes:
        networks: "lenet", or "wide-resnet" of depth 10 and width 1 without norms.
        structures: of the Hessian.
        batch_sizes: images a prediction.
        largest_of_peer: images of laplace-torch's largest prediction; 0 leaves it out.
        n_train: images of the fit.
        repetitions: predictions that are timed.
        device: cpu or cuda.
        threads: of torch.
        seed: of weights and images.
        out: folder of the results.
    """

    networks: list[str] = field(default_factory=lambda: ["lenet", "wide-resnet"])
    structures: list[str] = field(default_factory=lambda: ["kron", "diag"])
    batch_sizes: list[int] = field(default_factory=lambda: [8, 16, 32, 128, 512])
    largest_of_peer: int = 32
    n_train: int = 64
    repetitions: int = 3
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    out: str = "runs"


Predict = Callable[[Tensor], Tensor]


def make_network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    options = {"depth": 10, "width": 1, "norm": "none"} if name == "wide-resnet" else {}
    return build_model(name, in_channels=1, image_size=(28, 28), n_classes=10, **options).eval()


def our_predictive(model: nn.Module, structure: str, data: list[tuple[Tensor, Tensor]]) -> Predict:
    options = {"kfac_approx": "expand"} if structure == "kron" else {}
    la = Laplace(model, "classification", hessian_structure=structure, **options)
    la.fit(data)
    return la


def peer_predictive(model: nn.Module, structure: str, data: list[tuple[Tensor, Tensor]]) -> Predict:
    import laplace
    from torch.utils.data import DataLoader, TensorDataset

    la = laplace.Laplace(model, "classification", "all", structure)
    x, y = data[0]
    la.fit(DataLoader(TensorDataset(x, y), batch_size=len(x)))
    return lambda images: la(images, pred_type="glm", link_approx="probit")


@dataclass(frozen=True)
class Item:
    """One prediction to measure.

    Attributes:
        network: see `CostConfig`.
        structure: of the Hessian.
        n_images: of the prediction.
        is_ours: whether ours or laplace-torch's.
    """

    network: str
    structure: str
    n_images: int
    is_ours: bool


def cost(config: CostConfig, item: Item) -> dict[str, float]:
    """Seconds and MB of a prediction, after a first one."""
    torch.set_num_threads(config.threads)
    model = make_network(item.network, config.seed).to(config.device)
    generator = torch.Generator().manual_seed(config.seed)
    images = torch.randn(max(item.n_images, config.n_train), 1, 28, 28, generator=generator).to(config.device)
    x_train, x = images[: config.n_train], images[: item.n_images]
    data = [(x_train, torch.arange(len(x_train), device=x.device) % 10)]
    predict = (our_predictive if item.is_ours else peer_predictive)(model, item.structure, data)
    predict(x[:2])
    seconds = statistics.median(seconds_of(lambda: predict(x), x.device) for _ in range(config.repetitions))
    (peak,) = peak_bytes([lambda: predict(x)], x.device)
    return {"seconds": seconds, "megabytes": peak / 1e6}


def run(config: CostConfig) -> list[dict]:
    """One row for each network, structure and number of images; each figure is measured in a process of its own."""
    has_peer = config.largest_of_peer > 0 and importlib.util.find_spec("laplace") is not None
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for network, structure, n in product(config.networks, config.structures, config.batch_sizes):
            is_measured = has_peer and n <= config.largest_of_peer
            item = Item(network, structure, n, is_ours=True)
            theirs = pool.apply(cost, (config, replace(item, is_ours=False))) if is_measured else None
            rows.append(
                {
                    "network": network,
                    "n_weights": sum(p.numel() for p in make_network(network, config.seed).parameters()),
                    "structure": structure,
                    "n_images": n,
                    "ours": pool.apply(cost, (config, item)),
                    "laplace_torch": theirs,
                }
            )
            print(as_markdown(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def as_markdown(rows: list[dict]) -> str:
    """The table that is printed."""
    lines = [
        "| network | weights | structure | images | ours [s] | laplace-torch [s] | ours [MB] | laplace-torch [MB] |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, theirs = row["ours"], row["laplace_torch"]
        peer = (f"{theirs['seconds']:.2f}", f"{theirs['megabytes']:,.0f}") if theirs else ("", "")
        lines.append(
            f"| {row['network']} | {row['n_weights']:,} | {row['structure']} | {row['n_images']} | {ours['seconds']:.2f} | {peer[0]} | "
            f"{ours['megabytes']:,.0f} | {peer[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    config = read_config(CostConfig, __doc__)
    rows = run(config)
    print(as_markdown(rows))
    write_result(config, "prediction_cost", rows)


if __name__ == "__main__":
    main()
