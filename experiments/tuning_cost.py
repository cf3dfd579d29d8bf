"""What the choice of the hyperparameters costs after a fit: eigenvalues, log marginal likelihood and gradient, and the optimal prior.

    python experiments/tuning_cost.py --config configs/tuning_cost.yaml

Fits a Kronecker posterior of a Wide ResNet to random images and times what comes after (CPU time, medians): the eigenvalues of all
factors, once per fit; one evaluation of the log marginal likelihood with its gradient; the optimal layerwise prior precisions by Newton's
method, and by 100 steps of Adam. Checks that the gradient vanishes at the optimum. Prints the times and their share of the fit's.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from study import read_config, write_result
from torch import Tensor

from laplace_ws import Laplace
from laplace_ws.marglik import Hyperparameters
from laplace_ws.models import WideResNet
from laplace_ws.posterior import prior_groups


@dataclass(frozen=True)
class TuningConfig:
    """What is fitted.

    Attributes:
        depth: of the Wide ResNet.
        width: of the Wide ResNet.
        n_classes: outputs.
        image_size: sides of the images, of 3 channels.
        n_images: images of the fit.
        batch_size: of the fit.
        curvature: of the fit.
        kfac_approx: of the fit.
        n_repeats: timings of what comes after the fit.
        threads: of torch.
        seed: of weights, images and labels.
        out: folder of the results.
    """

    depth: int = 16
    width: int = 4
    n_classes: int = 10
    image_size: int = 32
    n_images: int = 256
    batch_size: int = 32
    curvature: str = "ef"
    kfac_approx: str = "reduce"
    n_repeats: int = 5
    threads: int = 1
    seed: int = 0
    out: str = "runs"


def seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads together."""
    start = time.process_time()
    work()
    return time.process_time() - start


def fitted(config: TuningConfig) -> tuple[Laplace, float]:
    """A posterior and the time of its fit; no weight is zero, so that no curvature is."""
    torch.manual_seed(config.seed)
    model = WideResNet(config.depth, config.width, 3, config.n_classes, norm="none")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    x = torch.randn(config.n_images, 3, config.image_size, config.image_size)
    y = torch.randint(0, config.n_classes, (config.n_images,))
    data = list(zip(x.split(config.batch_size), y.split(config.batch_size), strict=True))
    la = Laplace(model, "classification", curvature=config.curvature, kfac_approx=config.kfac_approx)
    la.fit(data[:1])
    return la, seconds(lambda: la.fit(data))


def gradient(la: Laplace, prior_precision: Tensor) -> Tensor:
    """∂ log p(D) / ∂ log δ, by parameter."""
    log_delta = prior_precision.log().requires_grad_()
    (g,) = torch.autograd.grad(la.log_marginal_likelihood(log_delta.exp()), log_delta)
    return g


def run(config: TuningConfig) -> dict[str, float]:
    """Seconds of each part, and how exact the optimum is."""
    la, fit = fitted(config)
    eigenvalues = seconds(lambda: [block.factor_eigenvalues for block in la.H.values()])
    start = torch.ones(len(la.shapes), dtype=torch.float64)
    groups = prior_groups(la.shapes, "layerwise")

    def adam() -> None:
        Hyperparameters(groups).ascend(copy.copy(la), 100)

    def median(work: Callable[[], object]) -> float:
        return statistics.median(seconds(work) for _ in range(config.n_repeats))

    optimum = la.optimal_prior_precision("layerwise")
    by_group = torch.zeros(len(groups.names), dtype=torch.float64).index_add_(0, groups.index, gradient(la, optimum))
    return {
        "fit": fit,
        "eigenvalues": eigenvalues,
        "evaluation_and_gradient": median(lambda: gradient(la, start)),
        "newton_optimum": median(lambda: la.optimal_prior_precision("layerwise")),
        "adam_100_steps": median(adam),
        "largest_gradient_at_optimum": by_group.abs().max().item(),
    }


def as_markdown(found: dict[str, float]) -> str:
    """The table that is printed."""
    lines = ["| | seconds | share of the fit |", "|---|---|---|"]
    for name in ("fit", "eigenvalues", "evaluation_and_gradient", "newton_optimum", "adam_100_steps"):
        lines.append(f"| {name.replace('_', ' ')} | {found[name]:.3f} | {found[name] / found['fit']:.2%} |")
    return "\n".join(lines)


def main() -> None:
    config = read_config(TuningConfig, __doc__)
    torch.set_num_threads(config.threads)
    found = run(config)
    print(as_markdown(found))
    print(f"largest |∂ log p(D)/∂ log δ| of a layer at the optimum: {found['largest_gradient_at_optimum']:.1e} nats")
    write_result(config, "tuning_cost", found)


if __name__ == "__main__":
    main()
