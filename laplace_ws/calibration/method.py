"""A way to predict, as calibration compares them: its probabilities, its samples if it has any, and what it takes to have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.trained import TrainedRun
from laplace_ws.distributed import Processes
from laplace_ws.experiment.evaluate import outputs
from laplace_ws.experiment.folder import ExperimentError, Json


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a method says about some images.

    Attributes:
        probs: class probabilities.
        samples: gives the class probabilities of each of S networks or functions that the method averages over, or could; None where
            it knows of one only. They may be drawn when this is called.
    """

    probs: Float[Tensor, "N K"]
    samples: Callable[[], Float[Tensor, "S N K"]] | None = None


Predict = Callable[[Float[Tensor, "N C H W"]], Prediction]
"""What a method says about normalised images; the same at every call."""


@dataclass(frozen=True, eq=False)
class Method:
    """A way to predict.

    Attributes:
        name: of its entry in calibration.json.
        label: for tables and pictures.
        predict: what it says about normalised images.
        facts: numbers that belong to it: its temperature, or its log marginal likelihood, prior precision and time.
        seconds: wall time of all training and fitting that it needs.
    """

    name: str
    label: str
    predict: Predict
    facts: Json
    seconds: float


def probabilities(model: nn.Module, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
    """softmax(f) of a network in eval mode, float64."""
    return outputs(model, x).double().softmax(-1)


def mean_of(samples: Float[Tensor, "S N K"]) -> Prediction:
    """The mean over sampled predictions."""
    return Prediction(samples.mean(0), lambda: samples)


def mean_over(models: Sequence[nn.Module]) -> Predict:
    """The mean over the probabilities of several networks."""
    return lambda x: mean_of(torch.stack([probabilities(model, x) for model in models]))


def divided(predict: Predict, group: Processes) -> Predict:
    """Predictions of which each process makes its share, every process then having all of them."""

    def predict_all(x: Tensor) -> Prediction:
        if group.size == 1 or len(x) < group.size:
            return predict(x)
        own = predict(x[group.rank :: group.size])
        samples = own.samples
        return Prediction(
            interleaved(group, own.probs), None if samples is None else lambda: interleaved(group, samples(), axis=1)
        )

    return predict_all


def interleaved(group: Processes, own: Tensor, axis: int = 0) -> Tensor:
    """The rows of all processes, of which each has every `group.size`-th one."""
    of_each = group.gather(own.cpu())
    out = own.new_empty(*own.shape[:axis], sum(part.shape[axis] for part in of_each), *own.shape[axis + 1 :])
    for rank, part in enumerate(of_each):
        out.movedim(axis, 0)[rank :: group.size] = part.to(out).movedim(axis, 0)
    return out


def require_validation(config: CalibrateConfig, trained: TrainedRun) -> None:
    """Reject a choice based on validation images where there are none.

    Raises:
        ExperimentError: says what to do without them.
    """
    if not len(trained.y_validation):
        raise ExperimentError(
            "temperature, covariance scales and priors by validation need training images that the network was not trained on, but that of "
            f"'{config.checkpoint}' was trained on all of them; train with a smaller data.n_train, or set --methods.temperature false and "
            "--methods.priors [marglik]"
        )
