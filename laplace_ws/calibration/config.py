"""What a calibration run is made of: one dataclass per section of the YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from laplace_ws.curvature import Curvature
from laplace_ws.data.corruptions import Corruption
from laplace_ws.kfac import KfacApprox
from laplace_ws.likelihoods.links import LinkApprox
from laplace_ws.metrics.ood import OodScore
from laplace_ws.options import OneOf
from laplace_ws.posterior.predict import PredType


@dataclass(frozen=True)
class CalibrationDataConfig:
    """Images on which the network is scored; an option that is not given is that of the training run.

    Attributes:
        root: folder of the data that the network was trained on.
        download: whether missing data may be downloaded into `root` and `ood_root`.
        n_test: size of a class-balanced subset of the test images.
        n_validation: size of a class-balanced subset of the training images that the network was not trained on, for temperature
            scaling and for priors chosen by them; all of them if not given. The test images are never used for a choice.
        ood: name of a data set of other things, as `laplace_ws.data` has them, whose test images are to be found out; none if not given.
        ood_root: folder of these; `root` if not given.
        ood_fit: whether to pad smaller images of these with black, and repeat a grey channel, to the shape of the network's images.
        n_ood: size of a class-balanced subset of these images; all of them if not given.
        corruptions: ways to damage the test images, each at five strengths (see `laplace_ws.data.corruptions`).
        n_corrupted: size of a class-balanced subset of the test images that are damaged; all of them if not given.
        batch_size: images per batch, in fits and predictions.
    """

    root: str | None = None
    download: bool = False
    n_test: int | None = None
    n_validation: int | None = None
    ood: str | None = None
    ood_root: str | None = None
    ood_fit: bool = False
    n_ood: int | None = None
    corruptions: list[OneOf[Corruption]] = field(default_factory=lambda: [c.value for c in Corruption])
    n_corrupted: int | None = None
    batch_size: int = 100


@dataclass(frozen=True)
class MethodsConfig:
    """Predictives that are compared with the network's own (MAP).

    Attributes:
        temperature: whether to scale the logits by a temperature, fitted on validation images.
        ensemble: run folders of further networks, trained alike on the same images from other seeds, for a deep ensemble; data.seed gives
            runs of several seeds the same images.
        mc_dropout: run folder of a network that was trained alike on the same images but with model.dropout, for Monte Carlo dropout; none
            if not given.
        swag_epochs: epochs of SGD at a constant learning rate whose weights make a SWAG posterior; 0 for none.
        swag_lr: that learning rate; half of the training's at its start if not given.
        laplace: structures of the Laplace posteriors: kron, ekfac, diag, full or lowrank, of all weights; with last_layer_ before it, as in
            last_layer_kron, of those of the last layer.
        curvature: exact GGN, GGN by sampled labels or signs, or empirical Fisher.
        kfac_approx: of the Kronecker structures: auto, expand or reduce, or a mapping from a pattern of layers to one of them.
        max_factor_dim: rows of the widest Kronecker factor that is kept whole; of wider ones only the diagonal is; no limit if not given.
        backend: native, asdl or backpack: who runs the model for the curvature; the numbers are the same.
        priors: by what the prior precision of each posterior is chosen, one predictive each: as it was in training, fixed or tuned with the
            weights (training), by the log marginal likelihood of the trained weights (marglik), the same with a multiplier of the
            covariance at which the NLL of the validation images is lowest (scaled), or as the one number of a grid at which it is
            lowest (validation).
        prior_structure: which parameters share a prior precision, for marglik and scaled.
        pred_type: of the linearised network (glm), or of networks with sampled weights (nn).
        link_approx: how class probabilities follow from Gaussian logits.
        n_samples: of weights, logits or passes with dropout, where a prediction or its split of uncertainty draws any.
    """

    temperature: bool = True
    ensemble: list[str] = field(default_factory=list)
    mc_dropout: str | None = None
    swag_epochs: int = 0
    swag_lr: float | None = None
    laplace: list[str] = field(default_factory=lambda: ["kron", "diag", "last_layer_kron", "last_layer_full"])
    curvature: OneOf[Curvature] = "ggn"
    kfac_approx: OneOf[KfacApprox] | dict[str, str] = "auto"
    max_factor_dim: int | None = None
    backend: str = "native"
    priors: list[Literal["training", "marglik", "scaled", "validation"]] = field(
        default_factory=lambda: ["training", "scaled"]
    )
    prior_structure: Literal["scalar", "layerwise", "parameter"] = "layerwise"
    pred_type: OneOf[PredType] = "glm"
    link_approx: OneOf[LinkApprox] = "probit"
    n_samples: int = 100


@dataclass(frozen=True)
class CalibrateConfig:
    """One network, and how its predictives are scored.

    Attributes:
        checkpoint: of `laplace-ws train`: a file checkpoint*.pt, or the run's folder, which means checkpoint.pt in it.
        out: folder of calibration.json and calibration.html; the run's if not given.
        seed: of sampling, and of the corruptions' noise.
        device: auto takes a GPU if there is one.
        threads: of torch.
        n_bins: bins of reliability diagrams, calibration error and confidence histograms.
        ood_score: by what other things are found out: 1 − the top probability (confidence), or the entropy of the prediction.
        data: images on which the network is scored.
        methods: predictives that are compared.
    """

    checkpoint: str
    out: str | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1
    n_bins: int = 15
    ood_score: OneOf[OodScore] = "confidence"
    data: CalibrationDataConfig = field(default_factory=CalibrationDataConfig)
    methods: MethodsConfig = field(default_factory=MethodsConfig)
