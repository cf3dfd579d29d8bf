"""Predictions by laplace-torch's calls, from the moments and samples of outputs that ours gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.compat.laplace_torch.hyperparameters import Hyperparameters
from laplace_ws.compat.laplace_torch.utils.data import moved
from laplace_ws.compat.laplace_torch.utils.enums import Likelihood, LinkApprox, PredType
from laplace_ws.likelihoods import Categorical, links
from laplace_ws.posterior import Laplace as Posterior


class Predictions(Hyperparameters, ABC):
    """The prediction methods of a posterior.

    Attributes:
        likelihood: "classification", "regression" or "reward_modeling".
        enable_backprop: whether predictions keep the graph to the inputs.
    """

    likelihood: str
    enable_backprop: bool

    @property
    @abstractmethod
    def posterior(self) -> Posterior:
        """Our posterior, at the current hyperparameters; an `AttributeError` before a fit."""

    def __call__(
        self,
        x: Any,
        pred_type: PredType | str = PredType.GLM,
        joint: bool = False,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The posterior predictive of a batch.

        Args:
            x: inputs.
            pred_type: "glm", or "nn", which needs `link_approx="mc"`.
            joint: for regression by "glm": the covariance over all inputs and outputs; goes before `diagonal_output`.
            link_approx: from outputs to probabilities.
            n_samples: samples, for "nn" and "mc".
            diagonal_output: only variances.
            generator: source of randomness.
            fitting: for rewards: predict which of a pair is preferred, as in training, in place of the rewards.
            **model_kwargs: none: bind arguments of the model into its forward.

        Returns:
            For classes, probabilities. For regression and rewards, mean and covariance of the outputs by "glm", mean and variances by
            "nn".
        """
        pred_type, link = self._checked(pred_type, link_approx, generator)
        if model_kwargs:
            raise TypeError(
                f"the model is called with the inputs alone; bind {', '.join(model_kwargs)} into its forward."
            )
        predicts_labels = self.likelihood == Likelihood.CLASSIFICATION or (
            self.likelihood == Likelihood.REWARD_MODELING and fitting
        )
        if pred_type is PredType.NN:
            f = self.functional_samples(x, pred_type, n_samples, generator=generator)
            return f.softmax(-1).mean(0) if predicts_labels else (f.mean(0), f.var(0))
        if not predicts_labels:
            return self._moments(x, joint=joint and self.likelihood == Likelihood.REGRESSION, diagonal=diagonal_output)
        needs_covariance = link in (LinkApprox.BRIDGE, LinkApprox.BRIDGE_NORM) or (
            link is LinkApprox.MC and not diagonal_output
        )
        f, spread = self._moments(x, joint=False, diagonal=not needs_covariance)
        return self._probabilities(f, spread, link, n_samples, generator)

    def predictive(
        self, x: Any, pred_type: PredType | str, link_approx: LinkApprox | str, n_samples: int
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The posterior predictive of a batch."""
        return self(x, pred_type, link_approx=link_approx, n_samples=n_samples)

    def functional_samples(
        self,
        x: Any,
        pred_type: PredType | str = PredType.GLM,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "S N C"]:
        """Outputs drawn from the posterior; for the arguments see `__call__`."""
        pred_type, _ = self._checked(pred_type, LinkApprox.MC, generator)
        options = {"backprop": self.enable_backprop, "generator": generator}
        if pred_type is PredType.GLM:
            options["diagonal_output"] = diagonal_output
        samples = self.posterior.functional_samples(moved(x, self._device), pred_type.value, n_samples, **options)
        return self._own(samples)

    def predictive_samples(
        self,
        x: Any,
        pred_type: PredType | str = PredType.GLM,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "S N C"]:
        """Probabilities, or regression means or rewards, at outputs drawn from the posterior."""
        f = self.functional_samples(x, pred_type, n_samples, diagonal_output, generator)
        return f.softmax(-1) if self.likelihood == Likelihood.CLASSIFICATION else f

    def _moments(self, x: Any, *, joint: bool, diagonal: bool) -> tuple[Tensor, Tensor]:
        f, spread = self.posterior.functional_moments(
            moved(x, self._device), joint=joint, diagonal_output=diagonal and not joint, backprop=self.enable_backprop
        )
        return self._own(f), self._own(spread)

    @staticmethod
    def _probabilities(
        f: Tensor, spread: Tensor, link: LinkApprox, n_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        return links.probabilities(Categorical(), f, spread, links.LinkApprox(link.value), n_samples, generator)

    def _own(self, found: Tensor) -> Tensor:
        """In the model's type, with a graph only where it is asked for."""
        found = found.to(self._dtype)
        return found if self.enable_backprop else found.detach()

    def _checked(
        self, pred_type: PredType | str, link_approx: LinkApprox | str, generator: torch.Generator | None
    ) -> tuple[PredType, LinkApprox]:
        """The options as members of their enumerations.

        Raises:
            ValueError: one is unknown, or they do not go together.
        """
        pred_type, link = PredType(pred_type), LinkApprox(link_approx)
        if pred_type is PredType.GP:
            raise ValueError('pred_type="gp" is not offered here; "glm" is the nearest.')
        if pred_type is PredType.NN and link is not LinkApprox.MC:
            raise ValueError('pred_type="nn" averages over sampled networks; give link_approx="mc" with it.')
        is_generator = isinstance(generator, torch.Generator)
        if generator is not None and not (is_generator and generator.device.type == self._device.type):
            raise ValueError(f"generator must be a torch.Generator on {self._device}, got {generator!r}.")
        return pred_type, link
