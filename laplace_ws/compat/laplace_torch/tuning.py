"""The choice of a prior precision by laplace-torch's calls."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torchmetrics
from jaxtyping import Float
from torch import Tensor

from laplace_ws.compat.laplace_torch.predictions import Predictions
from laplace_ws.compat.laplace_torch.utils.data import on_device
from laplace_ws.compat.laplace_torch.utils.enums import Likelihood, LinkApprox, PredType, PriorStructure, TuningMethod
from laplace_ws.compat.laplace_torch.utils.metrics import RunningNLLMetric
from laplace_ws.compat.laplace_torch.utils.utils import Loss, Scorer

OURS = {PriorStructure.SCALAR: "scalar", PriorStructure.LAYERWISE: "parameter", PriorStructure.DIAG: "weight"}
"""Our name of each structure: theirs calls a parameter tensor a layer."""


class Tuning(Predictions):
    """`optimize_prior_precision` of a posterior.

    Attributes:
        dict_key_y: the entry with the targets, of batches that are mappings.
    """

    dict_key_y: str

    def optimize_prior_precision(
        self,
        pred_type: PredType | str = PredType.GLM,
        method: TuningMethod | str = TuningMethod.MARGLIK,
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: PriorStructure | str = PriorStructure.SCALAR,
        val_loader: Any = None,
        loss: Loss | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
    ) -> None:
        """Choose and set the prior precision.

        Args:
            pred_type: of predictions on validation data.
            method: "marglik": steps of Adam up the log marginal likelihood. "gridsearch": the best of a grid on validation data, which are
                read once for the whole grid.
            n_steps, lr: of Adam.
            init_prior_prec: where it starts; of more than one number, these keep their structure.
            prior_structure: "scalar", "layerwise" (one for each parameter tensor), or "diag".
            val_loader: validation data.
            loss: a metric, or a function of predictions and targets of all of them; by default the squared error for regression and the
                negative log probability for classes. The first of equals is chosen.
            log_prior_prec_min, log_prior_prec_max, grid_size: of the grid.
            link_approx, n_samples: of predictions on validation data.
            verbose: print what was chosen.
            progress_bar: of no effect, as there is one pass.
        """
        pred_type, method = PredType(pred_type), TuningMethod(method)
        if method is TuningMethod.MARGLIK:
            if val_loader is not None:
                warnings.warn(
                    'method="marglik" looks at the training data alone and leaves val_loader unread.', stacklevel=2
                )
            self._by_marglik(n_steps, lr, init_prior_prec, PriorStructure(prior_structure))
        else:
            if val_loader is None:
                raise ValueError('method="gridsearch" needs val_loader, the validation data.')
            grid = torch.logspace(log_prior_prec_min, log_prior_prec_max, grid_size, device=self._device)
            losses = self._losses(grid, val_loader, loss, pred_type, LinkApprox(link_approx), n_samples)
            self.prior_precision = grid[min(range(grid_size), key=lambda i: (not math.isfinite(losses[i]), losses[i]))]
        if verbose:
            print(f"prior precision: {self.prior_precision}")

    def _by_marglik(
        self, n_steps: int, lr: float, init_prior_prec: float | Tensor, prior_structure: PriorStructure
    ) -> None:
        self.prior_precision = torch.as_tensor(init_prior_prec)
        posterior = self.posterior
        n_given, n_layers = len(self.prior_precision), len(posterior.parameter_names)
        kept = {n_layers: PriorStructure.LAYERWISE, posterior.n_params: PriorStructure.DIAG}
        structure = prior_structure if n_given == 1 else kept[n_given]
        posterior.optimize_prior_precision(
            "marglik", optimizer="adam", n_steps=n_steps, lr=lr, prior_structure=OURS[structure]
        )
        self.prior_precision = self._given_back(posterior.prior_precision)

    def _given_back(self, precision: Float[Tensor, ...]) -> Tensor:
        """Ours in the order of theirs."""
        return precision

    @torch.no_grad()
    def _losses(
        self,
        grid: Float[Tensor, " G"],
        val_loader: Any,
        loss: Loss | None,
        pred_type: PredType,
        link: LinkApprox,
        n_samples: int,
    ) -> list[float]:
        """The loss of each point of a grid."""
        if loss is None:
            is_regression = self.likelihood == Likelihood.REGRESSION
            metric = (
                torchmetrics.MeanSquaredError(num_outputs=self.posterior.n_outputs or 1)
                if is_regression
                else RunningNLLMetric()
            )
            loss = metric.to(self._device)
        scorers = [Scorer(loss) for _ in grid]
        for x, y in on_device(val_loader, self._device, self.dict_key_y).pairs():
            predictions = self._predictions(x, grid, pred_type, link, n_samples)
            for scorer, prediction in zip(scorers, predictions, strict=True):
                scorer.add(prediction, y)
        return [scorer.result() for scorer in scorers]

    def _predictions(
        self, x: Any, grid: Float[Tensor, " G"], pred_type: PredType, link: LinkApprox, n_samples: int
    ) -> Iterator[Any]:
        """The prediction of a batch at each point of a grid; by "glm" from one linearisation."""
        if pred_type is not PredType.GLM:
            before = self.prior_precision
            for point in grid:
                self.prior_precision = point
                yield self(x, pred_type, link_approx=link, n_samples=n_samples, fitting=True)
            self.prior_precision = before
            return
        predictor = self.posterior.predictor
        is_regression = self.likelihood == Likelihood.REGRESSION
        layout = predictor.layout(joint=False, diagonal_output=not is_regression and link is LinkApprox.PROBIT)
        priors = [predictor.prior.changed(precision=point) for point in grid.double()]
        f, spreads = predictor.moments_under([replace(predictor, prior=prior).damping for prior in priors], x, layout)
        for spread in spreads:
            yield (f, spread) if is_regression else self._probabilities(f, spread, link, n_samples)
