"""Choice of a posterior's prior precision: by the log marginal likelihood, or by predictions on validation data."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from laplace_ws.curvature.curvature_sum import Batches
from laplace_ws.posterior.groups import PriorStructure, prior_groups
from laplace_ws.posterior.links import LinkApprox
from laplace_ws.posterior.optimum import optimal_prior_and_noise
from laplace_ws.posterior.predictive import PredType
from laplace_ws.posterior.scores import make_score
from laplace_ws.posterior.validation import PredictionOptions, Unknowns, ValidatedPrior


class TuningMethod(str, Enum):
    """How a prior precision is chosen.

    `MARGLIK`: where the log marginal likelihood is highest. `GRIDSEARCH`: the best of a grid on validation data. `GRADIENT`: where the
    negative log likelihood of validation data is lowest, by its gradient.
    """

    MARGLIK = "marglik"
    GRIDSEARCH = "gridsearch"
    GRADIENT = "gradient"

    @classmethod
    def _missing_(cls, value: object) -> TuningMethod:
        raise ValueError(f"unknown method {value!r}: choose one of {', '.join(repr(m.value) for m in cls)}.")


class TunedPrior(ValidatedPrior):
    """How a fitted posterior chooses its prior precision, noise and temperature."""

    log_marginal_likelihood: Callable[..., Tensor]

    def optimize_prior_precision(
        self,
        method: str = "marglik",
        *,
        prior_structure: str = "scalar",
        val_loader: Batches | None = None,
        loss: str | Callable[[Any, Tensor], Any] = "nll",
        pred_type: str = "glm",
        link_approx: str = "probit",
        n_samples: int = 100,
        log_prior_prec_min: float = -4.0,
        log_prior_prec_max: float = 4.0,
        grid_size: int = 25,
        optimizer: str = "newton",
        n_steps: int = 100,
        lr: float = 0.1,
        optimize_noise: bool = False,
        optimize_temperature: bool = False,
        generator: torch.Generator | None = None,
        progress_bar: bool = False,
    ) -> Tensor:
        """Choose the prior precision, and set it; with it noise and temperature, where that is asked for.

        Args:
            method: "marglik": the optimum of the log marginal likelihood, with no pass over the data. "gridsearch": the
                best scalar of a grid on validation data, the whole grid in one pass over them. "gradient": the optimum of the mean
                negative log predictive density of validation data, by L-BFGS from the present values; each step is a pass over them.
            prior_structure: which weights share one: "scalar", "layerwise", "parameter" or "weight" (not with "kron" and "ekfac").
            val_loader: validation data, in batches like those of the fit, that the network was not trained on.
            loss: of "gridsearch": "nll", "ece", "brier", a torchmetrics metric (turned round where higher is better), or a function of
                predictions and targets.
            pred_type: of predictions on validation data, see `__call__`.
            link_approx: likewise.
            n_samples: likewise; each point of a grid sees the same draws.
            log_prior_prec_min: log₁₀ of the smallest point of the grid.
            log_prior_prec_max: log₁₀ of its largest.
            grid_size: its points, equally apart in the logarithm.
            optimizer: of "marglik": "newton", which goes to the optimum, or "adam", which takes steps towards it from the present values.
            n_steps: of "adam", and most of "gradient".
            lr: step size of "adam", on logarithms.
            optimize_noise: choose σ too (regression; not by "gridsearch").
            optimize_temperature: choose τ too, by "gradient".
            generator: source of randomness of sampled predictions.
            progress_bar: show one, if stderr is a terminal.

        Returns:
            The prior precision.
        """
        method = TuningMethod(method)
        options = PredictionOptions(PredType(pred_type), LinkApprox(link_approx), n_samples, generator)
        structure = PriorStructure(prior_structure)
        structure.check(self.hessian_structure)
        if optimize_noise and not self.likelihood.has_noise:
            raise ValueError(f"the {self.likelihood.name} likelihood has no noise to optimise.")
        if optimize_temperature and method is not TuningMethod.GRADIENT:
            raise ValueError(
                'the temperature is chosen on validation data: use method="gradient" (its log marginal likelihood compares only at equal '
                "temperature)."
            )
        unknowns = Unknowns(self, prior_groups(self.shapes, structure), optimize_noise, optimize_temperature)
        if method is TuningMethod.MARGLIK:
            if val_loader is not None or loss != "nll":
                raise ValueError(
                    'method="marglik" looks at the training data alone; leave out val_loader and loss, or use "gridsearch" or "gradient".'
                )
            if optimizer == "adam":
                self._ascend(unknowns, n_steps, lr)
            elif optimizer == "newton":
                found = optimal_prior_and_noise(self, structure, fix_noise=not optimize_noise)  # type: ignore[arg-type]
                self.prior_precision, self.sigma_noise = found
            else:
                raise ValueError(f'unknown optimizer {optimizer!r}: choose "newton" or "adam".')
            return self.prior_precision
        if val_loader is None:
            raise ValueError(f'method={method.value!r} needs val_loader; use method="marglik" without validation data.')
        if method is TuningMethod.GRADIENT:
            if loss != "nll" or options.pred_type is PredType.NN or options.link is not LinkApprox.PROBIT:
                raise ValueError(
                    'method="gradient" minimises loss="nll" of pred_type="glm" with link_approx="probit"; use "gridsearch" for others.'
                )
            self._descend(val_loader, unknowns, n_steps)
            return self.prior_precision
        if structure is not PriorStructure.SCALAR or optimize_noise:
            raise ValueError('method="gridsearch" chooses one scalar; use "gradient" for more.')
        grid = torch.logspace(log_prior_prec_min, log_prior_prec_max, grid_size, dtype=torch.float64)
        hidden = not (progress_bar and sys.stderr.isatty())
        batches = tqdm(val_loader, desc="prior precision", unit="batch", disable=hidden)
        scores = self._scores(batches, grid.tolist(), make_score(loss, self.likelihood), options)
        if not any(math.isfinite(score) for score in scores):
            raise ValueError("no point of the grid has a finite score; look at the loss and the validation data.")
        # of equals the stiffer one, as the data then do not ask for more freedom
        best = min(range(grid_size), key=lambda i: (not math.isfinite(scores[i]), scores[i], -i))
        if grid_size > 1 and best in (0, grid_size - 1):
            warnings.warn(
                f"the best prior precision of the grid, {grid[best]:g}, lies at its edge; widen it by log_prior_prec_min and "
                "log_prior_prec_max, or take it that the loss hardly depends on the prior.",
                stacklevel=2,
            )
        self.prior_precision = grid[best]
        return self.prior_precision

    def optimal_prior_precision(self, prior_structure: str = "layerwise") -> Tensor:
        """Δ at which the log marginal likelihood of the present fit is highest, at the present σ and τ; `prior_precision` stays as it is.

        The weights of a group that are all at the prior mean ask for an infinite δ, and weights without curvature for a zero one: they get
        the upper and the lower limit in `optimum.BOUNDS`.

        Args:
            prior_structure: which weights share one: "scalar", "layerwise", "parameter" or "weight", see `prior_groups`.
        """
        return optimal_prior_and_noise(self, prior_structure, fix_noise=True)[0]  # type: ignore[arg-type]

    def optimal_prior_and_noise(self, prior_structure: str = "layerwise") -> tuple[Tensor, Float[Tensor, ""]]:
        """Δ and σ at which the log marginal likelihood is highest together; otherwise as `optimal_prior_precision`."""
        return optimal_prior_and_noise(self, prior_structure, fix_noise=not self.likelihood.has_noise)  # type: ignore[arg-type]

    def _ascend(self, unknowns: Unknowns, n_steps: int, lr: float) -> None:
        """Steps of Adam up the log marginal likelihood."""
        values = unknowns.present().requires_grad_(True)
        adam = torch.optim.Adam([values], lr=lr, maximize=True)
        for _ in range(n_steps):
            adam.zero_grad()
            self.log_marginal_likelihood(*unknowns.split(values)).backward()
            adam.step()
        unknowns.assign(values)
