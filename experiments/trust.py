"""How far a Laplace posterior over all layers can be trusted, by the approximation of its curvature and the choice of its prior.

    python experiments/trust.py --config configs/trust.yaml

Networks tune their prior precisions while they train (K-FAC-reduce, one sampled label per image). At the weights so found, posteriors by
K-FAC-reduce, K-FAC-expand, EKFAC, the diagonal, the last layer and, where it fits, the exact GGN predict test images and damaged ones, each
under the prior of the training and under the prior precisions at which its own log marginal likelihood is highest, as they are and with
a covariance scale chosen on validation images; beside them the network itself, with and without a fitted temperature, and priors chosen on
the same validation images. For every weight whose exact block fits, the approximations are compared with it. Prints two tables of
means and standard errors over the seeds, and writes the figures of every seed as JSON, after each seed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from calibrate import mean_and_error
from study import read_config, write_result
from torch import Tensor, nn

from laplace_ws import Laplace, marglik_training
from laplace_ws.calibration.temperature import fit_temperature
from laplace_ws.data import STRENGTHS, ImageData, TensorLoader, balanced_indices, corrupt, load_dataset
from laplace_ws.experiment.evaluate import outputs
from laplace_ws.likelihoods.links import probit_scaled
from laplace_ws.marglik import MarglikResult
from laplace_ws.metrics import evaluate_classification
from laplace_ws.models import build_model

Predict = Callable[[Tensor], Tensor]
"""Class probabilities of images."""
SMALL_CNN = "small-cnn"


STRUCTURES: dict[str, dict[str, Any]] = {
    "reduce": {"hessian_structure": "kron", "kfac_approx": "reduce"},
    "expand": {"hessian_structure": "kron", "kfac_approx": "expand"},
    "ekfac": {"hessian_structure": "ekfac", "kfac_approx": "expand"},
    "diag": {"hessian_structure": "diag"},
    "full": {"hessian_structure": "full"},
    "last layer": {"hessian_structure": "kron", "subset_of_weights": "last_layer"},
}


@dataclass(frozen=True)
class NetworkConfig:
    """One network, trained once per seed.

    Attributes:
        name: of its rows.
        model: lenet, wide-resnet (depth 10, width 1, Fixup) or small-cnn, a network of 3,900 weights whose exact GGN fits.
        n_train: training images.
        n_epochs: of the training.
        lr: of SGD.
        chosen_on_validation: priors that are chosen on validation images, for K-FAC-expand: scalar (a grid) and layerwise (by gradient: its
            time grows with the weights).
        structures: the posteriors; full where it fits.
        n_corrupted: test images to be damaged in each way and strength; as for the other networks if not given.
    """

    name: str
    model: str
    n_train: int = 3000
    n_epochs: int = 60
    lr: float = 0.03
    chosen_on_validation: list[str] = field(default_factory=lambda: ["scalar"])
    structures: list[str] = field(default_factory=lambda: list(STRUCTURES))
    n_corrupted: int | None = None


@dataclass(frozen=True)
class TrustConfig:
    """What is trained and compared.

    Attributes:
        seeds: of initialisation, order and choice of images.
        networks: what is trained.
        dataset: name of the data, as `laplace_ws.data` has them.
        root: folder of the data.
        n_validation: training images that are left out and choose temperatures, scales and priors.
        n_test: test images.
        n_corrupted: of these, to be damaged in each way and strength.
        corruptions: ways to damage them.
        largest_block: weights of the largest parameter whose exact block is formed.
        largest_full: weights of the largest network whose exact GGN is formed.
        n_block_images: test images over which functional variances are compared.
        batch_size: of fits and predictions.
        threads: of torch.
        name: of the file of the results.
        out: its folder.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    networks: list[NetworkConfig] = field(default_factory=list)
    dataset: str = "fashion-mnist-subset"
    root: str = "data"
    n_validation: int = 1000
    n_test: int = 1000
    n_corrupted: int = 100
    corruptions: list[str] = field(default_factory=lambda: ["noise", "blur", "contrast"])
    largest_block: int = 2500
    largest_full: int = 5000
    n_block_images: int = 100
    batch_size: int = 100
    threads: int = 1
    name: str = "trust"
    out: str = "runs"


def small_cnn(image_size: int, n_classes: int) -> nn.Module:
    """Two convolutions and a linear layer."""
    side = ((image_size - 4) // 2 - 4 + 1) // 2
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, stride=2), nn.ReLU(), nn.Conv2d(6, 12, 5, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * side**2, n_classes),
    )  # fmt: skip


def make_network(config: NetworkConfig, data: ImageData) -> nn.Module:
    """An untrained network for images."""
    in_channels, image_size, _ = data.image_shape
    n_classes = int(data.y_train.max()) + 1
    if config.model == SMALL_CNN:
        return small_cnn(image_size, n_classes)
    own: dict[str, Any] = {"depth": 10, "width": 1, "norm": "fixup"} if config.model == "wide-resnet" else {}
    return build_model(config.model, in_channels=in_channels, image_size=image_size, n_classes=n_classes, **own)


@dataclass(frozen=True)
class Trained:
    """A trained network, and the images that score its predictions.

    Attributes:
        config: of the network.
        result: of its training.
        loader: training images.
        validation: images and classes that choose.
        test: images and classes that score.
        damaged: the same of damaged images, one pair for each way and strength.
    """

    config: NetworkConfig
    result: MarglikResult
    loader: TensorLoader
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    damaged: list[tuple[Tensor, Tensor]]

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.result.model


def train(config: TrustConfig, network: NetworkConfig, seed: int) -> Trained:
    """Train a network; training and validation images are disjoint."""
    n = network.n_train + config.n_validation
    data = load_dataset(config.dataset, root=config.root, n_train=n, n_test=config.n_test, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    kept, left_out = order[: network.n_train], order[network.n_train :]
    torch.manual_seed(seed)
    model = make_network(network, data)
    loader = TensorLoader(data.x_train[kept], data.y_train[kept], batch_size=64, shuffle=True, seed=seed)
    result = marglik_training(
        model,
        loader,
        n_epochs=network.n_epochs,
        curvature_budget=None,
        keep="best",  # as docs/results.md has it
        hyper_optimizer="adam",
        optimizer_kwargs={"lr": network.lr, "momentum": 0.9, "nesterov": True},
        progress_bar=False,
    )
    model.eval()
    chosen = balanced_indices(data.y_test, network.n_corrupted or config.n_corrupted, seed=seed)
    pixels, labels = data.to_pixels(data.x_test[chosen]), data.y_test[chosen]
    damaged = [
        (data.from_pixels(corrupt(pixels, corruption, strength, seed=seed)), labels)
        for corruption in config.corruptions
        for strength in STRENGTHS
    ]
    fit_loader = TensorLoader(data.x_train[kept], data.y_train[kept], batch_size=config.batch_size)
    validation = data.x_train[left_out], data.y_train[left_out]
    return Trained(network, result, fit_loader, validation, (data.x_test, data.y_test), damaged)


def scores(trained: Trained, predict: Predict) -> dict[str, float]:
    """Accuracy, NLL and ECE on test images, NLL and ECE on damaged ones."""
    test = evaluate_classification(predict(trained.test[0]), trained.test[1], kind="probs")
    damaged = [evaluate_classification(predict(x), y, kind="probs") for x, y in trained.damaged]
    found = {name: test[name] for name in ("accuracy", "nll", "ece")}
    return found | {f"damaged {name}": statistics.mean(s[name] for s in damaged) for name in ("nll", "ece")}


def posterior_predict(la: Laplace, batch_size: int) -> Callable[[float], Predict]:
    """For each covariance scale, the predictive by probit; the moments of each batch are computed once for all scales."""
    known: dict[int, tuple[Tensor, Tensor]] = {}
    la.covariance_scale = 1.0

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.data_ptr() not in known:
            parts = [la.functional_moments(part, diagonal_output=True) for part in x.split(batch_size)]
            f, variances = (torch.cat(both) for both in zip(*parts, strict=True))
            known[x.data_ptr()] = f, variances
        return known[x.data_ptr()]

    def at_scale(scale: float) -> Predict:
        def predict(x: Tensor) -> Tensor:
            f, variances = moments(x)
            return probit_scaled(f, scale * variances).softmax(-1)

        return predict

    return at_scale


def rows(config: TrustConfig, trained: Trained) -> Iterator[tuple[str, dict[str, float]]]:
    """Name and figures of every way to predict."""
    model = trained.model
    yield "network", scores(trained, lambda x: outputs(model, x).softmax(-1))
    temperature = fit_temperature(outputs(model, trained.validation[0]), trained.validation[1])
    yield (
        "temperature",
        scores(trained, lambda x: (outputs(model, x) / temperature).softmax(-1)) | {"scale": temperature},
    )
    n_weights = sum(p.numel() for p in model.parameters())
    for name in trained.config.structures:
        if name == "full" and n_weights > config.largest_full:
            continue
        yield from posterior_rows(config, trained, name, STRUCTURES[name])


def posterior_rows(
    config: TrustConfig, trained: Trained, name: str, options: dict[str, Any]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Rows of one structure: by prior, each with and without a covariance scale."""
    start = time.process_time()
    la = Laplace(trained.model, "classification", **options)
    la.fit(trained.loader)
    fit_seconds = time.process_time() - start
    validation = TensorLoader(*trained.validation, batch_size=config.batch_size)
    on_validation = trained.config.chosen_on_validation if name == "expand" else []
    priors = ["training", "re-tuned", *(f"validation, {prior}" for prior in on_validation)]
    for prior in priors:
        choose_prior(la, prior, trained, validation)
        at_scale = posterior_predict(la, config.batch_size)
        facts = {"evidence": la.log_marginal_likelihood().item(), "complexity": complexity(la), "fit": fit_seconds}
        yield f"{name}, {prior}", facts | scores(trained, at_scale(1.0))
        if not prior.startswith("validation"):
            start = time.process_time()
            scale = la.optimize_covariance_scale(validation)
            facts |= {"scale": scale, "choice": time.process_time() - start}
            yield f"{name}, {prior}, scaled", facts | scores(trained, at_scale(scale))


def choose_prior(la: Laplace, prior: str, trained: Trained, validation: TensorLoader) -> None:
    """Set the prior precision: that of the training, the best by evidence, or the best on validation images."""
    la.prior_precision = torch.tensor(
        [trained.result.prior_precision[name] for name in la.parameter_names], dtype=torch.float64
    )
    if prior == "re-tuned":
        la.optimize_prior_precision("marglik", prior_structure="layerwise")
    elif prior == "validation, scalar":
        la.optimize_prior_precision("gridsearch", val_loader=validation)
    elif prior == "validation, layerwise":
        la.optimize_prior_precision("gradient", prior_structure="layerwise", val_loader=validation, n_steps=20)


def complexity(la: Laplace) -> float:
    """½ [log det(H + Δ) − log det Δ], in nats: what the evidence subtracts from the log joint density."""
    log_joint = la.log_likelihood - 0.5 * la.prior.log_det_and_penalty(la.mean)[1]
    return (log_joint - la.log_marginal_likelihood()).item()


def block_rows(config: TrustConfig, trained: Trained) -> Iterator[tuple[str, dict[str, float]]]:
    """For each weight whose exact block fits: trace, functional variance and log determinant of each approximation beside it."""
    named = [(name, p) for name, p in trained.model.named_parameters() if p.ndim > 1]
    x = trained.test[0][: config.n_block_images]
    for name, parameter in named:
        if parameter.numel() > config.largest_block:
            continue
        delta = trained.result.prior_precision[name]
        found = {}
        for approx in ("full", "reduce", "expand", "ekfac"):
            options = {**STRUCTURES[approx], "subset_of_weights": [name], "prior_precision": delta}
            la = Laplace(trained.model, "classification", **options)
            la.fit(trained.loader)
            variance = la.functional_moments(x, diagonal_output=True)[1].mean().item()
            found[approx] = (la.H.to_dense().trace().item(), variance, complexity(la))
        trace, variance, exact_complexity = found.pop("full")
        for approx, (t, v, c) in found.items():
            figures = {"trace ratio": t / trace, "variance ratio": v / variance}
            yield f"{name}, {approx}", figures | {"complexity difference": c - exact_complexity}


def as_markdown(table: dict[str, dict[str, list[float]]], digits: dict[str, tuple[float, int]]) -> str:
    """Mean ± standard error over the seeds, for the named figures, each times a factor and with some decimals."""
    shown = [name for name in digits if any(name in row for row in table.values())]
    lines = ["| | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for label, row in table.items():
        cells = []
        for name in shown:
            factor, decimals = digits[name]
            values = [factor * value for value in row.get(name, []) if math.isfinite(value)]
            cells.append(mean_and_error(values, decimals) if values else "–")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


DIGITS = {
    "accuracy": (100.0, 1), "nll": (1.0, 3), "ece": (100.0, 1), "damaged nll": (1.0, 3), "damaged ece": (100.0, 1),
    "evidence": (1.0, 0), "complexity": (1.0, 0), "scale": (1.0, 3),
}  # fmt: skip
BLOCK_DIGITS = {"trace ratio": (1.0, 2), "variance ratio": (1.0, 2), "complexity difference": (1.0, 0)}

Table = dict[str, dict[str, list[float]]]


def add(table: Table, found: Sequence[tuple[str, dict[str, float]]]) -> None:
    """Append one seed's figures to the lists of a table."""
    for label, figures in found:
        for name, value in figures.items():
            table[label][name].append(value)


def main() -> None:
    config = read_config(TrustConfig, "Posteriors over all layers, by approximation and prior, over several seeds.")
    torch.set_num_threads(config.threads)
    tables: dict[str, Table] = {}
    blocks: dict[str, Table] = {}
    for network in config.networks:
        tables[network.name] = defaultdict(lambda: defaultdict(list))
        blocks[network.name] = defaultdict(lambda: defaultdict(list))
    for seed in config.seeds:
        for network in config.networks:
            start = time.perf_counter()
            trained = train(config, network, seed)
            add(tables[network.name], list(rows(config, trained)))
            add(blocks[network.name], list(block_rows(config, trained)))
            print(f"{network.name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        done = replace(config, seeds=config.seeds[: config.seeds.index(seed) + 1])
        write_result(done, config.name, {"predictions": tables, "blocks": blocks})
    for network in config.networks:
        print(f"\n{network.name}\n\n{as_markdown(tables[network.name], DIGITS)}")
        print(f"\n{as_markdown(blocks[network.name], BLOCK_DIGITS)}")


if __name__ == "__main__":
    main()
