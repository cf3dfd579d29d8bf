"""Scores of one method on test images, damaged test images, and out-of-distribution images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.method import Method, Prediction
from laplace_ws.calibration.result import CorruptedScores, MethodResult, Scores, Uncertainty
from laplace_ws.calibration.trained import TrainedRun
from laplace_ws.data import STRENGTHS, ImageData, balanced_indices, corrupt, fitted, load_dataset
from laplace_ws.experiment.evaluate import finite_or_none
from laplace_ws.metrics import (
    UncertaintySplit,
    evaluate_classification,
    ood_detection,
    ood_scores,
    reliability_curve,
    risk_coverage_curve,
    uncertainty_split,
)


@dataclass(frozen=True, eq=False)
class ScoredImages:
    """Images that every method predicts, normalised by the network's training images.

    Attributes:
        data: the network's training and test images.
        x_ood: out-of-distribution images; None where none were requested.
        x_damaged: the test images that will be damaged, as yet undamaged.
        y_damaged: their classes.
    """

    data: ImageData
    x_ood: Float[Tensor, "M C H W"] | None
    x_damaged: Float[Tensor, "D C H W"]
    y_damaged: Int[Tensor, " D"]


def load_scored_images(config: CalibrateConfig, trained: TrainedRun) -> ScoredImages:
    """The images on which methods are compared.

    Raises:
        DatasetNotFoundError: the out-of-distribution data are not there.
        ValueError: they have another shape, or a subset is larger than its data set.
    """
    data, n = trained.data, config.data.n_corrupted
    if not data.has_pixels and (config.data.corruptions or config.data.ood):
        raise ValueError(
            f"data.corruptions and data.ood need images of known pixels, which the tensors of {data.name} are not; leave them out, "
            "--data.corruptions [], or let the function return a laplace_ws.data.ImageData."
        )
    if n is not None and not 1 <= n <= len(data.y_test):
        raise ValueError(f"data.n_corrupted={n} must be from 1 to {len(data.y_test)}, the number of test images")
    chosen = slice(None) if n is None else balanced_indices(data.y_test, n, seed=config.seed).to(data.x_test.device)
    return ScoredImages(data, _ood_images(config, trained), data.x_test[chosen], data.y_test[chosen])


def score(method: Method, images: ScoredImages, config: CalibrateConfig) -> MethodResult:
    """Predict all images with a method, and score the predictions."""
    data = images.data
    start = time.perf_counter()
    prediction = method.predict(data.x_test)
    predict_seconds = time.perf_counter() - start
    probs, split = prediction.probs, split_of(prediction)
    ood_confidence = detection = ood_split = None
    if images.x_ood is not None:
        ood_prediction = method.predict(images.x_ood)
        ood_probs, ood_split = ood_prediction.probs, split_of(ood_prediction)
        # Whatever the labels are, the bins count confidences.
        no_labels = torch.zeros(len(ood_probs), dtype=torch.long, device=ood_probs.device)
        ood_confidence = reliability_curve(ood_probs, no_labels, config.n_bins).count
        detection = ood_detection(*(ood_scores(p, config.ood_score) for p in (probs, ood_probs)))
        if split is not None and ood_split is not None:
            detection["auroc_epistemic"] = ood_detection(split.epistemic, ood_split.epistemic)["auroc"]
    return MethodResult(
        method.name,
        method.label,
        method.facts,
        scores_of(probs, data.y_test, config.n_bins),
        reliability_curve(probs, data.y_test, config.n_bins),
        ood_confidence,
        detection,
        tuple(_corrupted_scores(method, images, config)),
        predict_seconds,
        method.seconds,
        risk_coverage_curve(probs, data.y_test),
        means_of(split),
        means_of(ood_split),
    )


def split_of(prediction: Prediction) -> UncertaintySplit | None:
    """The uncertainty of each image; None without samples."""
    return None if prediction.samples is None else uncertainty_split(prediction.samples())


def means_of(split: UncertaintySplit | None) -> Uncertainty | None:
    """Means over the images."""
    if split is None:
        return None
    return Uncertainty(*(values.mean().item() for values in (split.total, split.aleatoric, split.epistemic)))


def scores_of(probs: Float[Tensor, "N K"], labels: Int[Tensor, " N"], n_bins: int) -> Scores:
    """The scores by every metric."""
    found = evaluate_classification(probs, labels, n_bins, kind="probs")
    return {name: finite_or_none(value) for name, value in found.items()}


def _corrupted_scores(method: Method, images: ScoredImages, config: CalibrateConfig) -> Iterator[CorruptedScores]:
    if not config.data.corruptions:
        return
    pixels = images.data.to_pixels(images.x_damaged)

    def scored(x: Tensor, corruption: str, strength: int) -> CorruptedScores:
        prediction = method.predict(x)
        scores = scores_of(prediction.probs, images.y_damaged, config.n_bins)
        return CorruptedScores(corruption, strength, scores, means_of(split_of(prediction)))

    undamaged = scored(images.x_damaged, "", 0)
    for corruption in config.data.corruptions:
        yield replace(undamaged, corruption=corruption)
        for strength in STRENGTHS:
            x = images.data.from_pixels(corrupt(pixels, corruption, strength, seed=config.seed))
            yield scored(x, corruption, strength)


def _ood_images(config: CalibrateConfig, trained: TrainedRun) -> Tensor | None:
    d, data = config.data, trained.data
    if d.ood is None:
        return None
    other = load_dataset(
        d.ood,
        root=d.ood_root or trained.config.data.root,
        download=d.download,
        n_test=d.n_ood,
        seed=config.seed,
        device=data.x_test.device,
    )
    pixels = other.to_pixels(other.x_test)
    if d.ood_fit:
        try:
            pixels = fitted(pixels, data.image_shape)
        except ValueError as error:
            raise ValueError(f"data.ood={d.ood} with data.ood_fit: {error}") from error
    if pixels.shape[1:] != data.image_shape:
        shapes = ["x".join(map(str, shape)) for shape in (other.image_shape, data.image_shape)]
        raise ValueError(
            f"data.ood={d.ood} has images of {shapes[0]}, but the network was trained on images of {shapes[1]} (channels x height x "
            "width); choose a data set of that shape, or a smaller one with --data.ood_fit true"
        )
    return data.from_pixels(pixels)
