"""Size of a posterior's file, and error of what is loaded from it, by the type in which the curvature is stored.

    python experiments/file_precision.py --config configs/file_precision.yaml

Networks trained on the bundled Fashion-MNIST images; posteriors with layerwise prior precisions, chosen by their log marginal likelihood.
Each is saved with each `dtype`, loaded, and compared with what was saved: the log marginal likelihood, the variances of the outputs and the
probabilities of test images. With `sizes_of_resnet18`, also the sizes for a ResNet-18. Prints a table; writes JSON.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_curvature.tables import table
from study import read_config, write_result
from torch import Tensor, nn

from laplace_ws import Laplace, load_posterior
from laplace_ws.data import ImageData, TensorLoader, load_dataset
from laplace_ws.errors import NumericalRepairWarning
from laplace_ws.models import build_model

DTYPES = {"own": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class FilesConfig:
    """What is saved.

    Attributes:
        networks: "lenet", or "wide-resnet" of depth 10 and width 1 without norms.
        structures: of the Hessian.
        n_train: images.
        n_test: images whose predictions are compared.
        n_epochs: of the training, by Adam at a rate of 2e-3 in batches of 50.
        sizes_of_resnet18: whether to measure the file of a ResNet-18 with Kronecker factors, too.
        threads: of torch.
        seed: of weights and batches.
        out: folder of the results.
    """

    networks: list[str] = field(default_factory=lambda: ["lenet", "wide-resnet"])
    structures: list[str] = field(default_factory=lambda: ["kron", "ekfac", "diag"])
    n_train: int = 1000
    n_test: int = 200
    n_epochs: int = 15
    sizes_of_resnet18: bool = True
    threads: int = 1
    seed: int = 0
    out: str = "runs"


def trained(config: FilesConfig, name: str, data: ImageData) -> tuple[nn.Module, TensorLoader]:
    torch.manual_seed(config.seed)
    options = {"depth": 10, "width": 1, "norm": "none"} if name == "wide-resnet" else {}
    model = build_model(name, in_channels=1, image_size=(28, 28), n_classes=10, **options)
    loader = TensorLoader(data.x_train, data.y_train, batch_size=50, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(config.n_epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval(), loader


def saved_as(la: Laplace, dtype: torch.dtype | None) -> tuple[float, Laplace]:
    """Megabytes of the file, and what is loaded from it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "posterior.pt"
        la.save(path, dtype)
        return path.stat().st_size / 1e6, load_posterior(path, la.model)


def figures(la: Laplace, x: Tensor) -> tuple[float, Tensor, Tensor]:
    return la.log_marginal_likelihood().item(), la.functional_moments(x, diagonal_output=True)[1], la(x)


def row_of(la: Laplace, x: Tensor, network: str, dtype: str) -> dict[str, Any]:
    megabytes, loaded = saved_as(la, DTYPES[dtype])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evidence, variances, probabilities = figures(loaded, x)
    true_evidence, true_variances, true_probabilities = figures(la, x)
    relative = ((variances - true_variances) / true_variances).abs()
    return {
        "network": network,
        "structure": la.hessian_structure,
        "dtype": dtype,
        "megabytes": megabytes,
        "evidence": true_evidence,
        "evidence_error": abs(evidence - true_evidence),
        "variance_error_median": relative.median().item(),
        "variance_error_largest": relative.max().item(),
        "probability_error_largest": (probabilities - true_probabilities).abs().max().item(),
        "n_repairs": sum(issubclass(w.category, NumericalRepairWarning) for w in caught),
    }


def sizes_of_resnet18(seed: int) -> dict[str, float]:
    """Megabytes by type."""
    import torchvision

    torch.manual_seed(seed)
    model, x = torchvision.models.resnet18(num_classes=10).eval(), torch.randn(4, 3, 64, 64)
    la = Laplace(model, "classification", curvature="ef").fit([(x, torch.arange(4))])
    return {name: saved_as(la, dtype)[0] for name, dtype in DTYPES.items()}


def run(config: FilesConfig) -> dict[str, Any]:
    torch.set_num_threads(config.threads)
    rows = []
    data = load_dataset("fashion-mnist-subset", n_train=config.n_train)
    for network in config.networks:
        model, loader = trained(config, network, data)
        for structure, dtype in product(config.structures, DTYPES):
            if dtype == "own":
                la = Laplace(model, "classification", hessian_structure=structure).fit(loader)
                la.optimize_prior_precision("marglik", prior_structure="layerwise")
            rows.append(row_of(la, data.x_test[: config.n_test], network, dtype))
    return {"rows": rows, "resnet18": sizes_of_resnet18(config.seed) if config.sizes_of_resnet18 else {}}


def as_markdown(found: dict[str, Any]) -> str:
    """The table that is printed."""
    header = [
        "network",
        "structure",
        "stored in",
        "file [MB]",
        "evidence, off by [nats]",
        "variances, off by, median",
        "largest",
    ]
    lines = [
        [
            row["network"],
            row["structure"],
            row["dtype"],
            f"{row['megabytes']:.2f}",
            f"{row['evidence_error']:.2g} of {row['evidence']:,.0f}",
            *(f"{100 * row[name]:.2g} %" for name in ("variance_error_median", "variance_error_largest")),
            f"{row['probability_error_largest']:.1g}",
            str(row["n_repairs"]),
        ]
        for row in found["rows"]
    ]
    errors = table([*header, "probabilities, largest", "repairs"], lines)
    return "\n".join([errors, *(f"ResNet-18, kron, {name}: {size:.0f} MB" for name, size in found["resnet18"].items())])


def main() -> None:
    config = read_config(FilesConfig, __doc__)
    found = run(config)
    print(as_markdown(found))
    write_result(config, "file_precision", found)


if __name__ == "__main__":
    main()
