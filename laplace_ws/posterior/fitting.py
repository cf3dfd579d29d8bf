"""The fit of a posterior: one pass over the data, and what it leaves behind."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from laplace_ws.curvature import Backend, Curvature
from laplace_ws.curvature.backend import check_devices
from laplace_ws.curvature.checks import N_PROBED, LinearisationCheck
from laplace_ws.curvature.curvature_sum import Batches
from laplace_ws.curvature.inputs import BatchKeys, ModelInputs, StructuredInputs, split_batch
from laplace_ws.errors import InvalidBatchError, NotFittedError
from laplace_ws.matrices import CurvatureMatrix, Damping
from laplace_ws.posterior.fingerprint import check_surroundings, fingerprint, surroundings
from laplace_ws.posterior.hyperparameters import PosteriorHyperparameters
from laplace_ws.posterior.subset import WeightSubset, check_last_layer


@dataclass(frozen=True)
class FitSums:
    """What a pass over the data gives.

    Attributes:
        H: curvature of the summed negative log likelihood at σ = 1.
        nll_sum: the summed negative log likelihood at σ = 1, in nats.
        n_examples: examples seen.
        n_targets: targets that count.
        output_shape: of one example.
    """

    H: CurvatureMatrix
    nll_sum: float
    n_examples: int
    n_targets: float
    output_shape: tuple[int, ...]

    def standing_for(self, n_data: int | None) -> FitSums:
        """The sums of N examples like these; these themselves, if N is None."""
        if n_data is None or n_data == self.n_examples:
            return self
        factor = n_data / self.n_examples
        return FitSums(self.H * factor, self.nll_sum * factor, n_data, self.n_targets * factor, self.output_shape)

    def __add__(self, other: FitSums) -> FitSums:
        n_examples, n_targets = self.n_examples + other.n_examples, self.n_targets + other.n_targets
        return FitSums(self.H + other.H, self.nll_sum + other.nll_sum, n_examples, n_targets, self.output_shape)


Pairs = Iterable[tuple[ModelInputs, Tensor]]
"""Inputs and targets of batches; can be iterated over again where the user's data can."""


class FittedPosterior(PosteriorHyperparameters):
    """A posterior's fit to data, and what it knows of the model.

    Attributes:
        model: the network.
        subset: the weights that are covered.
        backend: who runs the network.
        curvature: of the negative log likelihood.
        mc_samples: random columns per example.
        generator: their source.
        keys: of batches that are mappings.
    """

    model: nn.Module
    subset: WeightSubset
    backend: Backend
    curvature: Curvature
    mc_samples: int
    generator: torch.Generator
    keys: BatchKeys
    _sums: FitSums | None
    _fitted_options: dict[str, Any]
    _n_arguments: int
    _check: LinearisationCheck
    _trained: frozenset[str]
    _surroundings: tuple[list[str], Tensor]
    _is_replaceable: bool
    _reads_data_again: ClassVar[bool] = False

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """Options that fits must share to be added up, and that a saved posterior must share to be loaded."""

    def fit(
        self,
        train_loader: Batches,
        *,
        n_data: int | None = None,
        override: bool = True,
        progress_bar: bool = False,
    ) -> None:
        """Take the curvature at the present weights, in one pass over the data.

        Args:
            train_loader: iterable of batches: pairs (x, y), rows (x1, x2, …, y) for `model(x1, x2, …)`, or mappings.
            n_data: N that the data stand for, where they are a sample of a larger set: likelihood and curvature are scaled up to it.
            override: whether the fit replaces the one before; else the data are added to those of that fit, at the same weights.
            progress_bar: show one, if stderr is a terminal.

        Raises:
            UnsupportedParameterError: a parameter that is to be covered cannot be.
            InvalidBatchError: the data do not fit the model or the likelihood, or are empty.
            ValueError: data cannot be added, as weights or options are not those of the fit before.
        """
        if n_data is not None and n_data < 1:
            raise ValueError(f"n_data must be at least 1, got {n_data}.")
        if self._reads_data_again and isinstance(train_loader, Iterator):
            raise InvalidBatchError(
                f"hessian_structure={self.hessian_structure!r} reads the data more than once, but a {type(train_loader).__name__} is used "
                "up after the first pass; give a DataLoader or a list of batches."
            )
        before = self._sums if not override else None
        if before is not None:
            self._check_same_fit()
        hidden = not (progress_bar and sys.stderr.isatty())
        with self.subset.active(self.model):
            pairs = _Again(lambda: self._noted(tqdm(train_loader, desc="Laplace fit", unit="batch", disable=hidden)))
            sums = self._take(pairs, None if before is None else before.H)
        sums = sums.standing_for(n_data)
        if before is not None and _form(before.output_shape) != _form(sums.output_shape):
            raise ValueError(
                f"the data give outputs {list(sums.output_shape)} an example, those of the fit before {list(before.output_shape)}; fit "
                "anew (override=True)."
            )
        self._sums = sums if before is None else before + sums
        self._fitted_options = self._options()
        self.mean = self.subset.flat(self.model)
        rest = surroundings(self.model, self.subset)
        self._surroundings = list(rest), fingerprint(rest)
        self._new_check()

    @abstractmethod
    def _take(self, pairs: Pairs, before: CurvatureMatrix | None) -> FitSums:
        """Sums over the data; `before` is what they will be added to."""

    @abstractmethod
    def check(self, x: Any) -> None:
        """Run the model on one batch and raise what a fit would raise, before any work is done.

        Raises:
            UnsupportedParameterError: a parameter that is to be covered cannot be; it is named, with the way out.
            InvalidBatchError: the batch is on another device, or the outputs do not fit.
        """

    def _noted(self, batches: Iterable[Any]) -> Iterator[tuple[ModelInputs, Tensor]]:
        """Batches as inputs and targets; of the first one it is noted how the model is called."""
        for number, batch in enumerate(batches):
            x, y = split_batch(batch, number, self.keys)
            if number == 0:
                self._n_arguments = len(x.arguments) if isinstance(x, StructuredInputs) else 1
                if self._trained:
                    check_devices(self.model, x)
                    check_last_layer(self.model, x[:N_PROBED], self.subset, self._trained)
            yield x, y

    def _check_same_fit(self) -> None:
        """Raise unless data can be added to the present fit."""
        for option, value in self._options().items():
            if self._fitted_options.get(option) != value:
                raise ValueError(
                    f"{option} was {self._fitted_options.get(option)!r} in the fit before and is {value!r}, and the two do not add up; set "
                    "it back, or fit anew (override=True)."
                )
        self.check_weights()

    def check_weights(self) -> None:
        """Raise unless the model is that of the fit: the covered weights to the rounding of float32, all else by its fingerprint."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        pairs = zip(self.subset.flat(self.model).to(self.mean).split(sizes), self.mean.split(sizes), strict=True)
        for name, (weights, mean) in zip(self.shapes, pairs, strict=True):
            difference = (weights - mean).abs().max().item()
            if not difference <= 1e-6 * mean.abs().max().item():
                raise ValueError(
                    f"the model's weights are not those of the fit ({name!r} differs by up to {difference:.3g}); put them back by "
                    "load_mean(), or fit anew."
                )
        check_surroundings(surroundings(self.model, self.subset), *self._surroundings)

    @torch.no_grad()
    def load_mean(self) -> None:
        """Write the mean of the posterior into the model's weights."""
        parameters = self.subset.parameters(self.model)
        for name, tensor in self.subset.tensors(self.model, self.mean).items():
            parameters[name].copy_(tensor)

    def _new_check(self) -> None:
        self._is_replaceable = False
        self._check = LinearisationCheck(self.backend, self.model, self.subset.parameters(self.model))

    @property
    def H(self) -> CurvatureMatrix:
        """Curvature of the summed negative log likelihood at σ = 1 and τ = 1."""
        return self._fitted.H

    @property
    def _fitted(self) -> FitSums:
        if self._sums is None:
            raise NotFittedError(f"{type(self).__name__} is not fitted yet; call fit(train_loader) first.")
        return self._sums

    @property
    def n_data(self) -> int:
        """N, the number of examples that the fit stands for; 0 before."""
        return 0 if self._sums is None else self._sums.n_examples

    @property
    def n_outputs(self) -> int | None:
        """Outputs of the network for one example (and term); None before a fit."""
        if self._sums is None:
            return None
        return self._sums.output_shape[-1] if self._sums.output_shape else 1

    @property
    def _output_shape(self) -> tuple[int, ...]:
        return self._fitted.output_shape

    @property
    def _n_targets(self) -> float:
        return self._fitted.n_targets

    def _nll_sum(self, sigma: Tensor) -> Tensor:
        unit = torch.tensor(self._fitted.nll_sum, dtype=torch.float64, device=self._device)
        return self.likelihood.nll_at_noise(unit, self._fitted.n_targets, sigma)

    def _scale(self, sigma: Tensor, tau: Tensor) -> Tensor:
        return self.likelihood.curvature_scale(sigma, self.curvature.value) / tau

    @property
    def _damping(self) -> Damping:
        """Scale s and Δ such that the posterior precision is s·H + Δ."""
        return self._scale(self._sigma_noise, self._temperature), self._prior_precision


def _form(output_shape: tuple[int, ...]) -> tuple[int, int]:
    """What outputs must share: their dimensions, and the size of the last; sequences and images may be of any size."""
    return len(output_shape), output_shape[-1] if output_shape else 1


class _Again:
    """An iterable that starts a new iterator whenever it is asked for one."""

    def __init__(self, start: Callable[[], Iterator[Any]]):
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        return self._start()
