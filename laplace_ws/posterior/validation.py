"""Choice of hyperparameters by predictions on validation data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import scipy.optimize
import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.curvature.curvature_sum import Batches
from laplace_ws.curvature.inputs import ModelInputs, split_batch
from laplace_ws.errors import InvalidBatchError
from laplace_ws.likelihoods import Categorical, RegressionLikelihood
from laplace_ws.matrices import Layout, Pushforward, expand_per_weight
from laplace_ws.posterior.groups import PriorGroups
from laplace_ws.posterior.links import LinkApprox
from laplace_ws.posterior.optimum import BOUNDS
from laplace_ws.posterior.predictive import Predictive, PredType
from laplace_ws.posterior.scores import predictive_nll


@dataclass(frozen=True)
class PredictionOptions:
    """How predictions on validation data are made, see `Predictive.__call__`."""

    pred_type: PredType
    link: LinkApprox
    n_samples: int
    generator: torch.Generator | None


@dataclass(frozen=True)
class Unknowns:
    """What is chosen, as a vector of logarithms: the prior precision of each group, then σ and τ where they are chosen too.

    Attributes:
        la: the posterior.
        groups: which weights share a prior precision.
        noise: whether σ is chosen.
        temperature: whether τ is.
    """

    la: Predictive
    groups: PriorGroups
    noise: bool
    temperature: bool

    def present(self) -> Float[Tensor, " U"]:
        """The present values; log δ averaged over the weights of each group."""
        la, n_groups = self.la, len(self.groups.names)
        log_delta = la.prior_precision_diag.log()
        group_of_weight = expand_per_weight(self.groups.index.to(log_delta.device), la.shapes)
        sums = log_delta.new_zeros(n_groups).index_add_(0, group_of_weight, log_delta)
        parts = [sums / torch.bincount(group_of_weight, minlength=n_groups)]
        parts += [la.sigma_noise.log()[None]] if self.noise else []
        parts += [la.temperature.log()[None]] if self.temperature else []
        return torch.cat(parts)

    def split(self, values: Float[Tensor, " U"]) -> tuple[Tensor, Tensor, Tensor]:
        """Δ, σ and τ of a vector."""
        n_groups = len(self.groups.names)
        others = iter(values[n_groups:].exp())
        sigma = next(others) if self.noise else self.la.sigma_noise
        tau = next(others) if self.temperature else self.la.temperature
        return self.groups.spread(values[:n_groups].exp()), sigma, tau

    def assign(self, values: Float[Tensor, " U"]) -> None:
        """Give the posterior the values of a vector."""
        self.la.prior_precision, self.la.sigma_noise, self.la.temperature = self.split(values.detach())


class ValidatedPrior(Predictive):
    """How the predictions of a posterior on validation data choose its hyperparameters."""

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
        """Predictions or targets of sequences and images with one row per term, so that those of different sizes can be joined."""
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

    def _descend(self, val_loader: Batches, unknowns: Unknowns, n_steps: int) -> None:
        """Minimise the mean negative log predictive density of validation data."""

        def value_and_gradient(point: Any) -> tuple[float, Any]:
            values = torch.as_tensor(point, dtype=torch.float64, device=self._device).requires_grad_(True)
            total, n_all, gradient = 0.0, 0, torch.zeros_like(values)
            delta, sigma, tau = unknowns.split(values)
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
        point = unknowns.present().clamp(*limits)
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
        unknowns.assign(values)

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
