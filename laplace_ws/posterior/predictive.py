"""The predictions of a posterior, as users ask for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.likelihoods.links import LinkApprox
from laplace_ws.posterior.predict import Prediction, PredictionOptions, Predictor, PredType


class Predictive(ABC):
    """The prediction methods of `Laplace`; each is a call to its `Predictor`."""

    @property
    @abstractmethod
    def predictor(self) -> Predictor:
        """The current posterior, as far as predictions need it; raises `NotFittedError` before a fit."""

    def __call__(
        self,
        x: Any,
        pred_type: str = "glm",
        link_approx: str = "probit",
        n_samples: int = 100,
        *,
        joint: bool = False,
        diagonal_output: bool = False,
        observation_noise: bool = False,
        backprop: bool = False,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """The posterior predictive of a batch; the model is run in eval mode and left as it was.

        Args:
            x: inputs, as in the batches of the fit: a tensor, a mapping, or a row (x1, x2, …) for `model(x1, x2, …)`.
            pred_type: "glm" or "nn", see `PredType`.
            link_approx: for "glm" and classes: "probit", "mc", "bridge" or "bridge_norm", see `LinkApprox`. "mc" samples the
                outputs from their covariance, or the weights, whichever takes fewer operations (`posterior.routes`): its cost does not grow
                with the classes where these are many, as that of the others does.
            n_samples: samples, for "nn" and "mc".
            joint: for regression by "glm": the covariance over all inputs and outputs.
            diagonal_output: only variances, without the covariances between outputs; for "mc" and regression.
            observation_noise: for regression: add the variance of the observation noise, so that it is that of a target.
            backprop: keep the graph to the inputs, and to the weights, whose `.grad` a backward pass fills.
            generator: source of randomness; default: torch's own.

        Returns:
            For classes, probabilities in the shape of the outputs. For regression, and of rewards, mean `[N, D]` and covariance
            `[N, D, D]`; with `joint`, `[N·D]` and `[N·D, N·D]`; with `diagonal_output`, and for outputs of more than two dimensions,
            mean and variance of one shape.

        Raises:
            NotFittedError: there is no fit.
            NotEnoughMemoryError: it takes more memory than is free; says how much, and what takes less.
            InvalidBatchError: the inputs do not fit the model, or the predictions are not finite.
        """
        options = PredictionOptions(
            PredType(pred_type),
            LinkApprox(link_approx),
            n_samples,
            generator,
            joint,
            diagonal_output,
            observation_noise,
            backprop,
        )
        return self.predictor.predict(x, options)

    def predict(
        self,
        x: Any,
        pred_type: str = "glm",
        link_approx: str = "probit",
        n_samples: int = 100,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One value for each target: the most probable class, or the mean of a regression; for the arguments see `__call__`.

        The mean of a regression by "glm" costs one forward pass, as it needs no covariance.

        Returns:
            Classes as whole numbers: `[N]` for outputs `[N, C]`, `[N, T]` for `[N, T, C]`; for "binary" 0 or 1 in the shape of the outputs.
            Means in the shape of the targets.

        Raises:
            NotFittedError: there is no fit.
            InvalidBatchError: the inputs do not fit the model, or the predictions are not finite.
        """
        options = PredictionOptions(PredType(pred_type), LinkApprox(link_approx), n_samples, generator)
        return self.predictor.point(x, options)

    def predict_proba(
        self,
        x: Any,
        pred_type: str = "glm",
        link_approx: str = "probit",
        n_samples: int = 100,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "N ..."]:
        """The probabilities of the classes, as `__call__` gives them, which has the arguments; for "binary" those of 1.

        Returns:
            Probabilities in the shape of the outputs.

        Raises:
            NotFittedError: there is no fit.
            ValueError: it is a regression.
            InvalidBatchError: the inputs do not fit the model, or the predictions are not finite.
        """
        options = PredictionOptions(PredType(pred_type), LinkApprox(link_approx), n_samples, generator)
        return self.predictor.probabilities(x, options)

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Float[Tensor, "S P"]:
        """Weights drawn from the posterior.

        Args:
            n_samples: S.
            generator: source of randomness; default: torch's own.

        Raises:
            NotEnoughMemoryError: they take more memory than is free.
        """
        return self.predictor.sample(n_samples, generator)

    def functional_moments(
        self, x: Any, *, joint: bool = False, diagonal_output: bool = False, backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the outputs of the linearised network.

        Returns:
            f `[N, C]` and `[N, C, C]`; for outputs `[N, T, C]`, `[N, T, C, C]`; with `diagonal_output`, and for outputs of more dimensions,
            variances in the shape of f; with `joint`, `[N·C]` and `[N·C, N·C]`.

        Raises:
            NotEnoughMemoryError: the covariances take more memory than is free.
        """
        f, spread = self.predictor.moments(x, joint=joint, diagonal_output=diagonal_output, backprop=backprop)
        return (f.flatten(), spread) if joint else (f, spread)

    def functional_samples(
        self,
        x: Any,
        pred_type: str = "glm",
        n_samples: int = 100,
        *,
        joint: bool = False,
        diagonal_output: bool = False,
        backprop: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "S N ..."]:
        """Outputs drawn from the posterior; for the arguments see `__call__`.

        Those of one sample belong together across inputs with "nn" and with `joint`, so that each sample is a function; without, they may
        or may not. By "glm" they come from the covariance of the outputs, or from samples of the weights, whichever takes fewer operations
        (`posterior.routes`).
        """
        options = PredictionOptions(
            PredType(pred_type),
            n_samples=n_samples,
            generator=generator,
            joint=joint,
            diagonal_output=diagonal_output,
            backprop=backprop,
        )
        return self.predictor.functional_samples(x, options)

    def predictive_samples(
        self,
        x: Any,
        pred_type: str = "glm",
        n_samples: int = 100,
        *,
        joint: bool = False,
        diagonal_output: bool = False,
        observation_noise: bool = False,
        backprop: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "S N ..."]:
        """Class probabilities or regression means at outputs drawn from the posterior; for the arguments see `__call__`.

        With `observation_noise` (regression), targets: noise is drawn for each.
        """
        options = PredictionOptions(
            PredType(pred_type),
            n_samples=n_samples,
            generator=generator,
            joint=joint,
            diagonal_output=diagonal_output,
            observation_noise=observation_noise,
            backprop=backprop,
        )
        return self.predictor.predictive_samples(x, options)
