"""Scores of one method on test images, damaged test images, and out-of-distribution images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.methods import Method
from laplace_ws.calibration.result import CorruptedScores, MethodResult, Scores
from laplace_ws.calibration.trained import TrainedRun
from laplace_ws.data import STRENGTHS, ImageData, balanced_indices, corrupt, load_dataset
from laplace_ws.experiment.evaluate import finite_or_none
from laplace_ws.metrics import evaluate_classification, ood_detection, ood_scores, reliability_curve


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
    if n is not None and not 1 <= n <= len(data.y_test):
        raise ValueError(f"data.n_corrupted={n} must be from 1 to {len(data.y_test)}, the number of test images")
    chosen = slice(None) if n is None else balanced_indices(data.y_test, n, seed=config.seed).to(data.x_test.device)
    return ScoredImages(data, _ood_images(config, trained), data.x_test[chosen], data.y_test[chosen])


def score(method: Method, images: ScoredImages, config: CalibrateConfig) -> MethodResult:
    """Predict all images with a method, and score the predictions."""
    data = images.data
    start = time.perf_counter()
    probs = method.predict(data.x_test)
    predict_seconds = time.perf_counter() - start
    ood_confidence = detection = None
    if images.x_ood is not None:
        ood_probs = method.predict(images.x_ood)
        # Whatever the labels are, the bins count confidences.
        no_labels = torch.zeros(len(ood_probs), dtype=torch.long, device=ood_probs.device)
        ood_confidence = reliability_curve(ood_probs, no_labels, config.n_bins).count
        detection = ood_detection(*(ood_scores(p, config.ood_score) for p in (probs, ood_probs)))
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
    )


def scores_of(probs: Float[Tensor, "N K"], labels: Int[Tensor, " N"], n_bins: int) -> Scores:
    """The scores by every metric."""
    found = evaluate_classification(probs, labels, n_bins, kind="probs")
    return {name: finite_or_none(value) for name, value in found.items()}


def _corrupted_scores(method: Method, images: ScoredImages, config: CalibrateConfig) -> Iterator[CorruptedScores]:
    if not config.data.corruptions:
        return
    pixels = images.data.to_pixels(images.x_damaged)
    undamaged = scores_of(method.predict(images.x_damaged), images.y_damaged, config.n_bins)
    for corruption in config.data.corruptions:
        yield CorruptedScores(corruption, 0, undamaged)
        for strength in STRENGTHS:
            x = images.data.from_pixels(corrupt(pixels, corruption, strength, seed=config.seed))
            yield CorruptedScores(corruption, strength, scores_of(method.predict(x), images.y_damaged, config.n_bins))


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
    if other.image_shape != data.image_shape:
        shapes = ["x".join(map(str, shape)) for shape in (other.image_shape, data.image_shape)]
        raise ValueError(
            f"data.ood={d.ood} has images of {shapes[0]}, but the network was trained on images of {shapes[1]} (channels x height x "
            "width); choose a data set of that shape"
        )
    return data.from_pixels(other.to_pixels(other.x_test))
