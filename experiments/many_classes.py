"""Time of predictions by samples of the linearised network, by the number of classes, in training steps.

    python experiments/many_classes.py --config configs/many_classes.yaml

ResNet-18 with random weights and images. A training step is a forward and a backward pass of the same images. For each number of classes,
with a diagonal posterior: a product with the Jacobian, a draw of the weights, whole predictions `la(x, link_approx="mc")`, and which way
they went; the moments of the outputs, whose cost grows with the classes, up to a number of classes. For each other structure: a draw of
the weights. CPU time; medians. Prints a table; writes JSON.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from bench_curvature.meter import seconds_of
from bench_curvature.setting import Work
from bench_curvature.tables import NOTHING, table
from study import read_config, write_result

from laplace_ws import Laplace
from laplace_ws.posterior.linear_samples import LinearSamples


@dataclass(frozen=True)
class ClassesConfig:
    """What is predicted.

    Attributes:
        n_classes: of the networks.
        n_samples: of the predictions.
        largest_of_moments: classes of the largest covariance.
        draws_of: structures of which a draw is timed, with the first number of classes; "kron" and "ekfac" take minutes of eigenvectors.
        n_images: of a prediction.
        image_size: side of the images.
        repetitions: of what takes no minutes.
        threads: of torch.
        seed: of weights and images.
        out: folder of the results.
    """

    n_classes: list[int] = field(default_factory=lambda: [10, 100, 1000])
    n_samples: list[int] = field(default_factory=lambda: [20, 100])
    largest_of_moments: int = 10
    draws_of: list[str] = field(default_factory=lambda: ["kron"])
    n_images: int = 4
    image_size: int = 64
    repetitions: int = 5
    threads: int = 1
    seed: int = 0
    out: str = "runs"


CPU = torch.device("cpu")
N_DRAWS = 8


def fitted(config: ClassesConfig, n_classes: int, structure: str) -> tuple[Laplace, torch.Tensor, torch.Tensor]:
    torch.manual_seed(config.seed)
    model = torchvision.models.resnet18(num_classes=n_classes).eval()
    x = torch.randn(config.n_images, 3, config.image_size, config.image_size)
    y = torch.arange(config.n_images) % n_classes
    la = Laplace(model, "classification", hessian_structure=structure, curvature="ef")
    return la.fit([(x, y)]), x, y


def median_of(work: Work, repetitions: int) -> float:
    work()
    return statistics.median(seconds_of(work, CPU) for _ in range(repetitions))


def step_seconds(la: Laplace, x: torch.Tensor, y: torch.Tensor, repetitions: int) -> float:
    parameters = list(la.model.parameters())
    return median_of(lambda: torch.autograd.grad(F.cross_entropy(la.model(x), y), parameters), repetitions)


def draw_seconds(la: Laplace) -> float:
    la.sample(1)

    def draw() -> None:
        for _ in la.predictor.deviations(N_DRAWS, None):
            pass

    return median_of(draw, 3) / N_DRAWS


def row_of(config: ClassesConfig, n_classes: int) -> dict[str, Any]:
    """Seconds of everything, with a diagonal posterior."""
    la, x, y = fitted(config, n_classes, "diag")
    linear = LinearSamples(la.network, (n_classes,), la.memory_budget)
    direction = 1e-3 * torch.randn(1, la.n_params)
    few, many = (
        median_of(lambda n=n: linear.outputs(x, [direction.expand(n, -1)]), config.repetitions) for n in (1, 11)
    )
    row: dict[str, Any] = {
        "n_classes": n_classes,
        "step": step_seconds(la, x, y, config.repetitions),
        "product": (many - few) / 10,
        "draw": draw_seconds(la),
        "predictions": {},
        "moments": None,
    }
    for n in config.n_samples:
        row["predictions"][n] = seconds_of(lambda n=n: la(x, link_approx="mc", n_samples=n), CPU)
    if n_classes <= config.largest_of_moments:
        row["moments"] = median_of(lambda: la.functional_moments(x), 1)
    return row


def run(config: ClassesConfig) -> dict[str, Any]:
    torch.set_num_threads(config.threads)
    rows = [row_of(config, n) for n in config.n_classes]
    draws = {}
    for structure in config.draws_of:
        la, x, y = fitted(config, config.n_classes[0], structure)
        draws[structure] = {"draw": draw_seconds(la), "step": step_seconds(la, x, y, config.repetitions)}
    return {"by_classes": rows, "draws": draws}


def as_markdown(found: dict[str, Any], n_samples: list[int]) -> str:
    """The table that is printed, in training steps."""
    predictions = [f"prediction, {n} samples" for n in n_samples]
    lines = []
    for row in found["by_classes"]:
        step = row["step"]
        cells = [f"{row['predictions'][n] / step:.0f}" for n in n_samples]
        moments = f"{row['moments'] / step:.0f}" if row["moments"] else NOTHING
        parts = [f"{row[name] / step:.2f}" for name in ("product", "draw")]
        lines.append([f"{row['n_classes']:,}", f"{step:.3f}", *parts, *cells, moments])
    by_classes = table(["classes", "step [s]", "product", "draw", *predictions, "moments"], lines)
    draws = [f"draw of {name}: {d['draw'] / d['step']:.1f} steps" for name, d in found["draws"].items()]
    return "\n".join([by_classes, *draws])


def main() -> None:
    config = read_config(ClassesConfig, __doc__)
    found = run(config)
    print(as_markdown(found, config.n_samples))
    write_result(config, "many_classes", found)


if __name__ == "__main__":
    main()
