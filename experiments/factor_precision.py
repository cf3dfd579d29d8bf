"""Error of Kronecker factors by the precision of their products, against float64.

    python experiments/factor_precision.py --config configs/factor_precision.yaml

The factors of a Wide ResNet on random images, empirical Fisher, in float32 with each `factor_precision`, beside those in float64. On a
CPU, "tf32" is float32. Prints the median and the largest ‖F − F*‖/‖F*‖ over the factors.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from bench_curvature.setting import make_batch, make_network
from study import read_config, write_result

from laplace_ws import kron_factors
from laplace_ws.kfac import FactorPrecision
from laplace_ws.matrices import Kron


@dataclass(frozen=True)
class PrecisionConfig:
    """What the factors are of.

    Attributes:
        depth: of the Wide ResNet.
        width: of the Wide ResNet.
        norm: fixup, batch, group or none.
        n_classes: outputs.
        image_size: sides of the images, of 3 channels.
        n_images: images.
        device: cpu or cuda.
        seed: of weights, images and labels.
        out: folder of the results.
    """

    depth: int = 16
    width: int = 4
    norm: str = "none"
    n_classes: int = 10
    image_size: int = 32
    n_images: int = 32
    device: str = "cpu"
    seed: int = 0
    out: str = "runs"


def errors(kron: Kron, truth: Kron) -> list[float]:
    """‖F − F*‖/‖F*‖ of every factor."""
    pairs = [pair for name, block in truth.items() for pair in ((kron[name].A, block.A), (kron[name].B, block.B))]
    return [
        ((found.double() - exact).norm() / exact.norm()).item()
        for found, exact in pairs
        if found is not None and exact is not None
    ]


def run(config: PrecisionConfig) -> list[dict]:
    """One row for each approximation and precision."""
    model = make_network(config.depth, config.width, config.n_classes, config.norm, config.image_size, config.seed).to(
        config.device
    )
    x, y = (t.to(config.device) for t in make_batch(config.n_images, config.n_classes, config.image_size, config.seed))
    rows = []
    for approx in ("reduce", "expand"):
        options = {"curvature": "ef", "kfac_approx": approx}
        truth = kron_factors(model.double(), "classification", [(x.double(), y)], **options)
        model.float()
        for precision in FactorPrecision:
            found = kron_factors(model, "classification", [(x, y)], factor_precision=precision, **options)
            of_factors = errors(found, truth)
            rows.append(
                {
                    "kfac_approx": approx,
                    "factor_precision": precision.value,
                    "median_error": statistics.median(of_factors),
                    "largest_error": max(of_factors),
                }
            )
    return rows


def as_markdown(rows: list[dict]) -> str:
    """The table that is printed."""
    lines = ["| approximation | factor_precision | median error | largest error |", "|---|---|---|---|"]
    for row in rows:
        figures = f"{row['median_error']:.1e} | {row['largest_error']:.1e}"
        lines.append(f"| {row['kfac_approx']} | {row['factor_precision']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    config = read_config(PrecisionConfig, __doc__)
    rows = run(config)
    print(as_markdown(rows))
    write_result(config, "factor_precision", rows)


if __name__ == "__main__":
    main()
