"""What a run of the command line is made of: one dataclass per section of the YAML file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

from laplace_ws.marglik import Schedule, TrainingOptions
from laplace_ws.marglik.optimizers import SGD_DEFAULTS

_DEFAULTS: dict[str, Any] = {f.name: f.default for cls in (Schedule, TrainingOptions) for f in fields(cls)}


@dataclass(frozen=True)
class DataConfig:
    """Images to train and test on.

    Attributes:
        name: fashion-mnist-subset (bundled), fashion-mnist, cifar10, cifar100 or image-folder.
        root: folder of the data; the bundled subset needs none.
        download: whether missing data may be downloaded into `root`.
        n_train: size of a class-balanced subset of the training images; all of them if not given.
        n_test: the same for the test images.
        held_out: whether to test on the training images that n_train leaves out, as long as settings are being chosen.
        batch_size: images per batch.
        augment: whether to crop and flip the training images at random.
    """

    name: str = "fashion-mnist-subset"
    root: str = "data"
    download: bool = False
    n_train: int | None = None
    n_test: int | None = None
    held_out: bool = False
    batch_size: int = 128
    augment: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The network; an option that is not given is the model's own default.

    Attributes:
        name: wide-resnet, lenet or mlp.
        depth: layers of a wide-resnet, 6n + 4.
        width: width factor of a wide-resnet.
        norm: of a wide-resnet: fixup, batch, group or none.
        hidden: units of an mlp's hidden layers.
        activation: of an mlp.
    """

    name: str = "wide-resnet"
    depth: int | None = None
    width: int | None = None
    norm: Literal["fixup", "batch", "group", "none"] | None = None
    hidden: list[int] | None = None
    activation: str | None = None


@dataclass(frozen=True)
class MarglikConfig:
    """Training, and the tuning in it; see `laplace_ws.marglik.marglik_training`.

    Attributes:
        n_epochs: epochs of gradient steps.
        n_epochs_burnin: epochs before the first tuning; a fifth of them all and at most 20 if not given.
        marglik_frequency: epochs between two tunings.
        n_hypersteps: steps on the hyperparameters at each tuning; newton takes as many as it needs.
        hyper_optimizer: adam, newton (to the optimum within max_log_step) or mackay; tune_temperature needs adam.
        lr_hyp: step size of adam on their logarithms.
        max_log_step: largest change of a logarithm at one tuning.
        fit_fraction: share of the batches that a tuning sees.
        prior_structure: which parameters share a prior precision; weight is for diag and full.
        prior_prec_init: start of the prior precisions; 0.01 times the number of images if not given. With layerwise, the
            elementwise scales and biases of norms and Fixup start at 1 whatever is given.
        temperature_init: temperature of the likelihood, at the start.
        tune_temperature: whether to tune it; the last epoch's network is kept then, not the best.
        hessian_structure: of the Laplace approximation.
        curvature: exact GGN, GGN by sampled labels, or empirical Fisher.
        kfac_approx: auto, expand or reduce, or a mapping from a pattern of layers to one of them.
        backend: native, asdl or backpack: who runs the model for the curvature; the numbers are the same.
        mc_samples: labels or signs drawn per image for ggn_mc and ggn_mc_rademacher.
        final_curvature: of the last fit; `curvature` if not given.
        optimizer: of the weights.
        lr: its step size at the start; a cosine takes it to zero.
        momentum: Nesterov momentum of sgd.
    """

    n_epochs: int = _DEFAULTS["n_epochs"]
    n_epochs_burnin: int | None = _DEFAULTS["n_epochs_burnin"]
    marglik_frequency: int = _DEFAULTS["marglik_frequency"]
    n_hypersteps: int = _DEFAULTS["n_hypersteps"]
    hyper_optimizer: Literal["adam", "newton", "mackay"] = _DEFAULTS["hyper_optimizer"]
    lr_hyp: float = _DEFAULTS["lr_hyp"]
    max_log_step: float = _DEFAULTS["max_log_step"]
    fit_fraction: float = _DEFAULTS["fit_fraction"]
    prior_structure: Literal["scalar", "layerwise", "parameter", "weight"] = _DEFAULTS["prior_structure"]
    prior_prec_init: float | None = _DEFAULTS["prior_prec_init"]
    temperature_init: float = _DEFAULTS["temperature_init"]
    tune_temperature: bool = _DEFAULTS["tune_temperature"]
    hessian_structure: Literal["kron", "ekfac", "diag", "full", "lowrank"] = _DEFAULTS["hessian_structure"]
    curvature: Literal["ggn", "ggn_mc", "ggn_mc_rademacher", "ef"] = _DEFAULTS["curvature"]
    kfac_approx: Literal["auto", "expand", "reduce"] | dict[str, str] = _DEFAULTS["kfac_approx"]
    backend: str = _DEFAULTS["backend"]
    mc_samples: int = _DEFAULTS["mc_samples"]
    final_curvature: Literal["ggn", "ggn_mc", "ggn_mc_rademacher", "ef"] | None = _DEFAULTS["final_curvature"]
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = SGD_DEFAULTS["lr"]
    momentum: float = SGD_DEFAULTS["momentum"]


@dataclass(frozen=True)
class BaselinesConfig:
    """Networks trained beside the tuned one, from the same start and in the same order of batches.

    Attributes:
        fixed_prior_precisions: one network each; divided by the number of images it is the weight decay. With
            marglik.prior_structure=layerwise it does not reach the elementwise scales and biases of norms and Fixup,
            whose prior precision stays at 1 in all of these networks.
    """

    fixed_prior_precisions: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RunConfig:
    """One run.

    Attributes:
        name: of the run's folder.
        out: folder of all runs.
        seed: of initialisation, batches and sampling.
        device: auto takes a GPU if there is one.
        threads: of torch in each process.
        workers: processes that train side by side; the numbers are those of one.
        test_every: epochs between two looks at the test set, for the report's curves; nothing is tuned by them.
        likelihood: of the labels; images have classes.
        data: images to train and test on.
        model: the network.
        marglik: training and tuning.
        baselines: networks at fixed prior precisions, to compare with.
        report: whether to write report.html at the end.
    """

    name: str = "run"
    out: str = "runs"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1
    workers: int = 1
    test_every: int = 1
    likelihood: Literal["classification"] = "classification"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    marglik: MarglikConfig = field(default_factory=MarglikConfig)
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
    report: bool = True


class UnknownKeyError(ValueError):
    """A key that no section of the configuration has."""


def config_keys(cls: type = RunConfig, prefix: str = "") -> list[str]:
    """All keys with dots, sections included: "data", "data.name", …"""
    hints = get_type_hints(cls)
    keys = []
    for f in fields(cls):
        keys.append(prefix + f.name)
        if is_dataclass(hints[f.name]):
            keys += config_keys(hints[f.name], f"{prefix}{f.name}.")
    return keys


def check_keys(keys: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a key that is not known.

    Raises:
        UnknownKeyError: says which, and the nearest known one.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UnknownKeyError(f"unknown key '{key}'; did you mean '{near}'?")


def flatten(values: Mapping[str, Any], known: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """Values by keys with dots, sections included; goes down into sections only, not into a value that is a mapping."""
    known = list(known)
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat[key] = value
        if isinstance(value, Mapping) and any(k.startswith(f"{key}.") for k in known):
            flat |= flatten(value, known, f"{key}.")
    return flat
