"""Choice of a posterior's prior precision: by the log marginal likelihood, or by predictions on validation data."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import scipy.optimize
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from laplace_ws.curvature.compute import Batches
from laplace_ws.curvature.inputs import ModelInputs, split_batch
from laplace_ws.errors import InvalidBatchError
from laplace_ws.likelihoods import Categorical, RegressionLikelihood
from laplace_ws.matrices import Layout, Pushforward, expand_per_weight
from laplace_ws.posterior.groups import PriorStructure, prior_groups
from laplace_ws.posterior.links import LinkApprox
from laplace_ws.posterior.optimum import BOUNDS, optimal_prior_and_noise
from laplace_ws.posterior.predictive import Predictive, PredType
from laplace_ws.posterior.scores import make_score, predictive_nll


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


@dataclass(frozen=True)
class PredictionOptions:
    """How predictions on validation data are made, see `Predictive.__call__`."""

    pred_type: PredType
    link: LinkApprox
    n_samples: int
    generator: torch.Generator | None


class TunedPrior(Predictive):
    """How a fitted posterior chooses its prior precision, noise and temperature."""

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
        n_steps: int = 50,
        optimize_noise: bool = False,
        optimize_temperature: bool = False,
        generator: torch.Generator | None = None,
        progress_bar: bool = False,
    ) -> Tensor:
        """Choose the prior precision, and set it; with it noise and temperature, where that is asked for.

        Args:
            method: "marglik": the optimum of the log marginal likelihood, by Newton's method, with no pass over the data. "gridsearch": the
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
            n_steps: most steps of "gradient".
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
        if method is TuningMethod.MARGLIK:
            if val_loader is not None or loss != "nll":
                raise ValueError(
                    'method="marglik" looks at the training data alone; leave out val_loader and loss, or use "gridsearch" or "gradient".'
                )
            delta, sigma = optimal_prior_and_noise(self, structure, fix_noise=not optimize_noise)  # type: ignore[arg-type]
            self.prior_precision, self.sigma_noise = delta, sigma
            return self.prior_precision
        if val_loader is None:
            raise ValueError(f'method={method.value!r} needs val_loader; use method="marglik" without validation data.')
        if method is TuningMethod.GRADIENT:
            if loss != "nll" or options.pred_type is PredType.NN or options.link is not LinkApprox.PROBIT:
                raise ValueError(
                    'method="gradient" minimises loss="nll" of pred_type="glm" with link_approx="probit"; use "gridsearch" for others.'
                )
            self._descend(val_loader, structure, optimize_noise, optimize_temperature, n_steps)
            return self.prior_precision
        if structure is not PriorStructure.SCALAR or optimize_noise:
            raise ValueError('method="gridsearch" chooses one scalar; use "gradient" for more.')
        grid = torch.logspace(log_prior_prec_min, log_prior_prec_max, grid_size, dtype=torch.float64)
        hidden = not (progress_bar and sys.stderr.isatty())
        batches = tqdm(val_loader, desc="prior precision", unit="batch", disable=hidden)
        scores = self._scores(batches, grid.tolist(), make_score(loss, self.likelihood), options)
        if not any(math.isfinite(score) for score in scores):
            raise ValueError("no point of the grid has a finite score; look at the loss and the validation data.")
        self.prior_precision = grid[min(range(grid_size), key=lambda i: (not math.isfinite(scores[i]), scores[i]))]
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

    # ---------------------------------------------------------------- on validation data

    def _scores(
        self,
        val_loader: Batches,
        grid: Sequence[float],
        score: Callable[[Any, Tensor], float],
        options: PredictionOptions,
    ) -> list[float]:
        """The score of each prior precision, in one pass over the data."""
        predictions: list[list[Any]] = [[] for _ in grid]
        targets = []
        scale = self._damping[0]
        dampings = [(scale, scale.new_tensor(delta)) for delta in grid]
        pushforward = self.H.pushforward(dampings, self._layout(False, not self._needs_covariance(options.link)))
        for x, y in self._validation(val_loader):
            at_points = self._predictions(x, y, grid, pushforward, options)
            for of_point, prediction in zip(predictions, at_points, strict=True):
                of_point.append(self._by_term(prediction))
            targets.append(self._by_term(y, is_label=True))
        y = torch.cat(targets)
        return [score(_joined(of_point), y) for of_point in predictions]

    def _by_term(self, prediction: Any, *, is_label: bool = False) -> Any:
        """Predictions or targets of sequences and images with one row a term, so that those of different sizes can be joined."""
        if isinstance(prediction, tuple):
            return tuple(self._by_term(part) for part in prediction)
        n_axes = 1 if is_label and isinstance(self.likelihood, Categorical) else 2
        return prediction.flatten(0, -n_axes) if prediction.ndim > n_axes else prediction

    def _validation(self, val_loader: Batches) -> Iterator[tuple[ModelInputs, Tensor]]:
        """Inputs and targets."""
        is_empty = True
        for number, batch in enumerate(val_loader):
            is_empty = False
            yield split_batch(batch, number, self.keys)
        if is_empty:
            raise InvalidBatchError("val_loader holds no batch; give an iterable that is not empty or used up.")

    def _predictions(
        self, x: ModelInputs, y: Tensor, grid: Sequence[float], pushforward: Pushforward, options: PredictionOptions
    ) -> Iterator[Any]:
        """Predictions at each prior precision, from one linearisation; by sampling, with the same draws for each."""
        state = _state_of(options.generator, self._device)
        if options.pred_type is PredType.NN:
            before = self.prior_precision
            try:
                for delta in grid:
                    _restore(options.generator, state, self._device)
                    self.prior_precision = delta
                    outputs = self._network_outputs(x, options.n_samples, options.generator, False)
                    self.likelihood.check(outputs[0], y)
                    yield self._mean_over_samples(outputs, True, isinstance(self.likelihood, RegressionLikelihood))
            finally:
                self.prior_precision = before
            return
        f, spreads = self._linearised().moments(self._inputs(x), self.H, pushforward)
        self.likelihood.check(f, y)
        for spread in spreads:
            _restore(options.generator, state, self._device)
            if isinstance(self.likelihood, RegressionLikelihood):
                yield self._variances_of_targets(f, spread, self.sigma_noise)
            else:
                yield self._probabilities(f, spread, options.link, options.n_samples, options.generator)

    def _variances_of_targets(self, f: Tensor, spread: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variances of the targets, of one shape."""
        if spread.ndim > f.ndim:
            spread = spread.diagonal(dim1=-2, dim2=-1).reshape(f.shape)
        return self._of_targets(f, spread, sigma)

    def _descend(
        self,
        val_loader: Batches,
        structure: PriorStructure,
        optimize_noise: bool,
        optimize_temperature: bool,
        n_steps: int,
    ) -> None:
        """Minimise the mean negative log predictive density of validation data over logarithms of hyperparameters."""
        groups = prior_groups(self.shapes, structure)
        index = groups.index.to(self._device)
        n_groups = len(groups.names)
        start = self._group_means(index, n_groups)
        is_tuned = [optimize_noise, optimize_temperature]
        rest = torch.stack([self.sigma_noise.log(), self.temperature.log()])[
            torch.tensor(is_tuned, device=self._device)
        ]

        def hyperparameters(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            others = iter(values[n_groups:])
            sigma = next(others).exp() if optimize_noise else self.sigma_noise
            tau = next(others).exp() if optimize_temperature else self.temperature
            return groups.spread(values[:n_groups].exp()), sigma, tau

        def value_and_gradient(point: Any) -> tuple[float, Any]:
            values = torch.as_tensor(point, dtype=torch.float64, device=self._device).requires_grad_(True)
            total, n_all, gradient = 0.0, 0, torch.zeros_like(values)
            delta, sigma, tau = hyperparameters(values)
            pushforward = self.H.pushforward([(self._scale(sigma, tau), delta)], Layout.DIAGONAL)
            for x, y in self._validation(val_loader):
                for part in self._differentiable_parts(len(x)):
                    f, (spread,) = self._linearised().moments(self._inputs(x[part]), self.H, pushforward)
                    self.likelihood.check(f, y[part])
                    if isinstance(self.likelihood, RegressionLikelihood):
                        prediction: Any = self._variances_of_targets(f, spread, sigma)
                    else:
                        prediction = self._probabilities(f, spread, LinkApprox.PROBIT, 0, None)
                    n_targets = self.likelihood.n_targets(f, y[part])
                    if not n_targets:
                        continue
                    nll = predictive_nll(self.likelihood, prediction, y[part]).double() * n_targets
                    gradient += torch.autograd.grad(nll, values, retain_graph=True)[0]
                    total, n_all = total + nll.item(), n_all + n_targets
            if not n_all or not math.isfinite(total):
                what = f"their negative log likelihood is {total}" if n_all else "none of their targets counts"
                raise InvalidBatchError(f"the validation data choose no prior precision: {what}; look at val_loader.")
            return total / n_all, (gradient / n_all).cpu().numpy()

        limits = [math.log(bound) for bound in BOUNDS]
        point = torch.cat([start, rest]).clamp(*limits)
        found = scipy.optimize.minimize(
            value_and_gradient,
            point.cpu().numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=[tuple(limits)] * len(point),
            options={"maxiter": n_steps, "ftol": 1e-12, "gtol": 1e-7},
        )
        if not found.success:
            warnings.warn(
                f"the gradient method stopped after {found.nit} steps before its end ({found.message}).", stacklevel=4
            )
        values = torch.as_tensor(found.x, dtype=torch.float64, device=self._device)
        self.prior_precision, self.sigma_noise, self.temperature = hyperparameters(values)

    def _group_means(self, index: Tensor, n_groups: int) -> Float[Tensor, " G"]:
        """Where to start from: the present log δ, averaged over the weights of each group."""
        log_delta = self.prior_precision_diag.log()
        group_of_weight = expand_per_weight(index, self.shapes)
        sums = log_delta.new_zeros(n_groups).index_add_(0, group_of_weight, log_delta)
        return sums / torch.bincount(group_of_weight, minlength=n_groups)

    def _differentiable_parts(self, n_examples: int) -> Iterator[slice]:
        """Examples whose Jacobians over all weights, which the gradient needs at a time, fit into the memory budget."""
        n_outputs = math.prod(self._output_shape)
        size = max(1, int(self.memory_budget // (8 * self.n_params * n_outputs)))
        for start in range(0, n_examples, size):
            yield slice(start, start + size)


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return torch.cat(list(parts))


def _state_of(generator: torch.Generator | None, device: torch.device) -> Tensor:
    if generator is not None:
        return generator.get_state()
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _restore(generator: torch.Generator | None, state: Tensor, device: torch.device) -> None:
    if generator is not None:
        generator.set_state(state)
    elif device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
