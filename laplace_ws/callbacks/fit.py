"""What the callbacks share: a posterior of the network that another library trains, and its evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from laplace_ws.curvature.batches import Data
from laplace_ws.curvature.processes import unwrapped
from laplace_ws.errors import NotFittedError
from laplace_ws.likelihoods import Likelihood
from laplace_ws.posterior import Laplace
from laplace_ws.values import whole_number

EVIDENCE = "log_marginal_likelihood"
"""Name under which the evidence is logged."""


@dataclass(eq=False)
class PosteriorFits:
    """Fits posteriors of a network and keeps the last one.

    Attributes:
        likelihood: of the targets.
        prior_structure: which weights share a prior precision, chosen where the log marginal likelihood is highest, together with the noise
            of a regression; None leaves both as they are.
        every_n_epochs: epochs between two fits while the network trains; None for one at the end alone.
        options: others of `Laplace`.
        history: log marginal likelihood in nats of each fit, by epoch.
    """

    likelihood: str | Likelihood
    prior_structure: str | None = "layerwise"
    every_n_epochs: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    history: dict[int, float] = field(default_factory=dict[int, float])
    last: Laplace | None = None

    def __post_init__(self) -> None:
        if self.every_n_epochs is not None:
            whole_number("every_n_epochs", self.every_n_epochs, least=1)

    @property
    def la(self) -> Laplace:
        """The last posterior.

        Raises:
            NotFittedError: there is none yet.
        """
        if self.last is None:
            raise NotFittedError("the callback has fitted no posterior yet; train with it first.")
        return self.last

    def is_due(self, epoch: int) -> bool:
        """Whether there is a fit after an epoch, counted from 1, before the end of the training."""
        return self.every_n_epochs is not None and epoch % self.every_n_epochs == 0

    def fit(self, model: nn.Module, loader: Data, epoch: int) -> float:
        """Fit a posterior at the weights as they are; returns the log marginal likelihood in nats.

        Args:
            model: the network, which may be wrapped for several processes.
            loader: the training data.
            epoch: the last one, counted from 1.
        """
        la = Laplace(unwrapped(model), self.likelihood, **self.options).fit(loader)
        if self.prior_structure is not None:
            has_noise = la.likelihood.has_noise
            la.optimize_prior_precision("marglik", prior_structure=self.prior_structure, optimize_noise=has_noise)
        self.last = la
        self.history[epoch] = la.log_marginal_likelihood().item()
        return self.history[epoch]
