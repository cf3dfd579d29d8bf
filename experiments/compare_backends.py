"""The backends beside each other, on Wide ResNets of every norm: how far their factors differ, and what they cost.

    python experiments/compare_backends.py --config configs/compare_backends.yaml

For each network, curvature and approximation: the largest relative difference ‖F₁ − F₂‖/‖F₁‖ of any Kronecker factor between any two
backends, in float64, and the CPU time of each backend for one batch in float32, in units of one training step (forward and full
backward) of the same batch, measured in turns in one process. Weights are random; statistics of normalisations are those of one batch.
What a fit does once, its check on four examples and the tracing of the model, is left out of the times.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_curvature.meter import seconds_of
from bench_curvature.ours import prepare
from bench_curvature.setting import Setting, TrainingStep, make_batch, make_network
from study import read_config, write_result
from torch import nn
from tqdm import tqdm

from laplace_ws.curvature import FACTOR_BACKENDS, kron_factors
from laplace_ws.matrices import Kron
from laplace_ws.models import MLP, Norm


@dataclass(frozen=True)
class CompareConfig:
    """What is compared.

    Attributes:
        networks: a `norm` of the Wide ResNet each, or "mlp": a perceptron with two hidden layers of 64.
        depth: of the Wide ResNet.
        width: of the Wide ResNet.
        n_classes: outputs.
        image_size: sides of the images, of 3 channels.
        n_images: images of the batch that is timed.
        n_images_compared: images of the batch that the factors are compared on, in float64.
        curvatures: of ggn, ggn_mc, ef.
        kfac_approxes: of expand, reduce.
        n_repeats: timings of each, of which the median counts.
        threads: of torch.
        seed: of weights and images.
        out: folder of the JSON file.
    """

    networks: tuple[str, ...] = ("none", "fixup", "batch", "group")
    depth: int = 10
    width: int = 1
    n_classes: int = 10
    image_size: int = 32
    n_images: int = 32
    n_images_compared: int = 4
    curvatures: tuple[str, ...] = ("ggn", "ggn_mc", "ef")
    kfac_approxes: tuple[str, ...] = ("reduce", "expand")
    n_repeats: int = 3
    threads: int = 1
    seed: int = 0
    out: str = "runs"


def make_model(config: CompareConfig, network: str) -> nn.Module:
    """The perceptron, or a Wide ResNet with this norm as the benchmarks have it."""
    if network == "mlp":
        torch.manual_seed(config.seed)
        return MLP(3 * config.image_size**2, [64, 64], config.n_classes).eval()
    sizes = (config.depth, config.width, config.n_classes, network, config.image_size)
    return make_network(*sizes, config.seed).eval()


def relative_differences(first: Kron, second: Kron) -> dict[str, float]:
    """‖F₁ − F₂‖/‖F₁‖ of every factor of two posteriors."""
    differences = {}
    for name, block in first.items():
        for side, one, other in (("A", block.A, second[name].A), ("B", block.B, second[name].B)):
            if one is not None and other is not None:
                differences[f"{name} {side}"] = ((one - other).norm() / one.norm()).item()
    return differences


def largest_difference(config: CompareConfig, model: nn.Module, curvature: str, approx: str) -> dict[str, float | str]:
    """Over all pairs of backends and all factors."""
    x, y = make_batch(config.n_images_compared, config.n_classes, config.image_size, config.seed)
    model, data = model.double(), [(x.double(), y)]
    krons = []
    for backend in FACTOR_BACKENDS:
        generator = torch.Generator().manual_seed(config.seed)
        options = {"curvature": curvature, "kfac_approx": approx, "backend": backend, "generator": generator}
        krons.append(kron_factors(model, "classification", data, **options))
    model.float()
    found = {k: v for pair in itertools.combinations(krons, 2) for k, v in relative_differences(*pair).items()}
    factor = max(found, key=found.__getitem__)
    return {"largest_difference": found[factor], "factor": factor, "n_factors": len(found)}


def times(config: CompareConfig, model: nn.Module, curvature: str, approx: str) -> dict[str, float]:
    """Median CPU time of each backend for one batch, and of a training step, in seconds."""
    x, y = make_batch(config.n_images, config.n_classes, config.image_size, config.seed)
    work: dict[str, Callable[[], None]] = {"training step": TrainingStep(model, x, y)}
    for name in FACTOR_BACKENDS:
        work[name] = prepare(Setting(model, x, y, approx, curvature), backend=name)
    for do in work.values():
        do()  # the check, and what a backend does once for a model
    measured: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(config.n_repeats):
        for name, do in work.items():
            measured[name].append(seconds_of(do, x.device))
    return {name: statistics.median(values) for name, values in measured.items()}


def compare(config: CompareConfig) -> list[dict]:
    """One row for each network, curvature and approximation."""
    rows = []
    runs = list(itertools.product(config.networks, config.curvatures, config.kfac_approxes))
    for network, curvature, approx in tqdm(runs, unit="setting", disable=None):
        model = make_model(config, network)
        difference = largest_difference(config, model, curvature, approx)
        seconds = times(config, model, curvature, approx)
        in_steps = {name: seconds[name] / seconds["training step"] for name in FACTOR_BACKENDS}
        setting = {"network": network, "curvature": curvature, "kfac_approx": approx}
        rows.append({**setting, **difference, "in_training_steps": in_steps, "seconds": seconds})
    return rows


def as_markdown(rows: list[dict]) -> str:
    """The table that is printed."""
    lines = [
        f"| network | curvature | approximation | largest difference of a factor | {' | '.join(FACTOR_BACKENDS)} |",
        "|---" * (4 + len(FACTOR_BACKENDS)) + "|",
    ]
    for row in rows:
        cells = " | ".join(f"{row['in_training_steps'][name]:.2f}" for name in FACTOR_BACKENDS)
        setting = f"{row['network']} | {row['curvature']} | {row['kfac_approx']}"
        lines.append(f"| {setting} | {row['largest_difference']:.1e} ({row['factor']}) | {cells} |")
    return "\n".join(lines)


def check(config: CompareConfig) -> None:
    """Exit with what is wrong, before any work."""
    known = ("mlp", *(norm.value for norm in Norm))
    wrong = [network for network in config.networks if network not in known]
    if wrong:
        raise SystemExit(f"unknown network {wrong[0]!r}: choose of {', '.join(known)}")
    if config.n_repeats < 1:
        raise SystemExit(f"n_repeats={config.n_repeats} must be at least 1")


def main() -> None:
    config = read_config(CompareConfig, __doc__)
    check(config)
    torch.set_num_threads(config.threads)
    rows = compare(config)
    print(as_markdown(rows))
    print("times in training steps of the same batch")
    write_result(config, "compare_backends", rows)


if __name__ == "__main__":
    main()
