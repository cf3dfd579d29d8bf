"""The contract of a likelihood, and what several of them share."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch leaves the types of split, tolist and cholesky_ex open

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.errors import InvalidBatchError


class Likelihood(ABC):
    """p(y | f), and what curvature needs of it.

    Attributes:
        name: the name by which `make_likelihood` knows it.
        has_noise: whether it has an observation noise σ.
        is_regression: whether predictions are means and variances of y, see `RegressionLikelihood`; else they are probabilities.
        predicts_outputs: whether predictions are mean and covariance of the outputs f themselves, though the targets are labels.
        target_ndim: axes of the targets that belong to one loss term: 1 for a vector like the outputs, 0 for one label for all outputs
            of the term.
        links: names of the approximations that turn Gaussian outputs into class probabilities, see `links.LinkApprox`; none
            where predictions have a closed form.
        scores: names of the scores of predictions that `score` knows.
        sigma_noise: σ in the units of the targets; 1 where there is no noise.
    """

    name: str
    has_noise: bool = False
    is_regression: bool = False
    predicts_outputs: bool = False
    target_ndim: int = 1
    links: tuple[str, ...] = ("probit", "mc")
    scores: tuple[str, ...] = ("nll",)
    sigma_noise: float = 1.0

    @abstractmethod
    def check(self, f: Tensor, y: Tensor) -> None:
        """Raise `InvalidBatchError` if outputs and targets do not fit this likelihood."""

    @abstractmethod
    def nll_sum(self, f: Float[Tensor, "N ..."], y: Tensor) -> Float[Tensor, ""]:
        """Negative log likelihood −Σ_n Σ_t log p(y_nt | f_nt), normalising constants included."""

    @abstractmethod
    def hessian_columns(
        self, f: Float[Tensor, "N ..."], mask: Tensor | None = None
    ) -> Iterator[Float[Tensor, "N ..."]]:
        """Columns s_c with Σ_c s_c s_cᵀ = ∇²_f(−log p) for each example; those that vanish are left out.

        Args:
            f: outputs.
            mask: the terms that count, as `term_mask` gives them; the columns are zero at the others.
        """

    def root_of_diagonal(self, f: Float[Tensor, "N ..."], mask: Tensor | None = None) -> Float[Tensor, "N ..."] | None:
        """The square root of the Hessian's diagonal, for where nothing else of it counts; None where it takes the columns to know it.

        Args:
            f: outputs.
            mask: see `hessian_columns`.
        """
        return None

    def projected_column(self, f: Float[Tensor, "N ..."], generator: torch.Generator | None) -> Float[Tensor, "N ..."]:
        """Σ_c ε_c s_c with fresh signs ε_c = ±1 for each example: the mean of its outer product is the Hessian."""
        column = torch.zeros_like(f)
        for root in self.hessian_columns(f):
            column += root * random_signs(f.shape[:1] + (1,) * (f.ndim - 1), f, generator)
        return column

    @abstractmethod
    def sampled_column(self, f: Float[Tensor, "N ..."], generator: torch.Generator | None) -> Float[Tensor, "N ..."]:
        """Gradient of −log p(y | f) in f at fresh labels y drawn from the model's own p(y | f)."""

    @abstractmethod
    def gradient_column(self, f: Float[Tensor, "N ..."], y: Tensor) -> Float[Tensor, "N ..."]:
        """Gradient of −log p(y | f) in f at the observed labels."""

    @abstractmethod
    def predictive_mean(self, f: Float[Tensor, "N ..."]) -> Float[Tensor, "N ..."]:
        """E[y | f]: class probabilities, or the regression mean."""

    def most_probable(self, probabilities: Float[Tensor, "N ... C"]) -> Int[Tensor, "N ..."]:
        """The most probable label of each loss term, given what is predicted: here, of the classes on the last axis."""
        return probabilities.argmax(-1)

    def needs_covariance(self, link: str) -> bool:
        """Whether predictions need the covariance of Gaussian outputs rather than only their variances.

        Args:
            link: the approximation that leads from outputs to probabilities.

        Raises:
            ValueError: the approximation does not apply to this likelihood.
        """
        if link not in self.links:
            raise ValueError(f'link_approx={link!r} is for "classification"; use "probit" or "mc".')
        return link != "probit"

    def predictive_nll(self, prediction: Any, y: Tensor) -> Float[Tensor, ""]:
        """Mean negative log probability of targets in nats, differentiable in the prediction.

        Args:
            prediction: probabilities; for regression, mean and variances of the targets, of the same shape.
            y: targets.

        Raises:
            ValueError: this likelihood does not provide it.
        """
        raise ValueError(f'loss="nll" is not known for {self.name!r}; pass a function of predictions and targets.')

    def score(self, name: str, prediction: Any, y: Tensor) -> float:
        """A score of predictions on validation data, lower is better.

        Args:
            name: one of `scores`.
            prediction: see `predictive_nll`.
            y: targets.
        """
        return self.predictive_nll(prediction, y).item()

    def term_mask(self, f: Float[Tensor, "N ..."], y: Tensor) -> Tensor | None:
        """Which loss terms count, one entry per target, in a shape that broadcasts to f; None where all do."""
        return None

    @property
    def ignores_targets(self) -> bool:
        """Whether there are targets whose terms do not count, so that the curvature depends on the targets."""
        return type(self).term_mask is not Likelihood.term_mask

    def n_targets(self, f: Float[Tensor, "N ..."], y: Tensor) -> int:
        """Number of targets that count."""
        mask = self.term_mask(f, y)
        return y.numel() if mask is None else int(mask.count_nonzero())

    def at_noise(self, sigma_noise: float) -> Likelihood:
        """This likelihood with another σ; unchanged where there is no noise."""
        return self

    def nll_at_noise(self, unit_nll_sum: Tensor, n_targets: float, sigma_noise: Tensor) -> Tensor:
        """Turn the summed NLL at σ = 1 into the one at `sigma_noise` (the same, where there is no noise)."""
        return unit_nll_sum

    def curvature_scale(self, sigma_noise: Tensor, curvature: str) -> Tensor:
        """Factor between the curvature at σ = 1 and at `sigma_noise`."""
        return torch.ones_like(sigma_noise)

    def options(self) -> dict[str, Any]:
        """Arguments that recreate this likelihood, as plain values."""
        return {}

    def state(self) -> dict[str, Any]:
        """Name and options, from which `likelihood_from_state` recreates this likelihood."""
        return {"name": self.name, **self.options()}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.options().items())
        return f"{type(self).__name__}({arguments})"


class RegressionLikelihood(Likelihood):
    """A likelihood of real targets, whose predictions are means and variances.

    Attributes:
        has_linear_mean: whether E[y | f] is some of the outputs f themselves, so that their joint covariance is that of the means.
    """

    is_regression = True
    has_linear_mean: bool = False
    links: tuple[str, ...] = ()

    def predictive_nll(self, prediction: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        """See `Likelihood.predictive_nll`; that of a Gaussian with the predicted moments."""
        mean, variances = prediction
        return 0.5 * ((y - mean).square() / variances + variances.log() + math.log(2 * math.pi)).mean()

    def needs_covariance(self, link: str) -> bool:
        """See `Likelihood.needs_covariance`: always, as the covariance is what is predicted."""
        return True

    def target_moments(
        self, f: Float[Tensor, "N ... C"], spread: Tensor, sigma_noise: Tensor | None, *, joint: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the targets, given those of the outputs.

        Args:
            f: mean of the outputs.
            spread: their covariance for each example, their variances, or, with `joint`, the covariance of all of them.
            sigma_noise: σ, if the observation noise is to be added.
            joint: whether `spread` is over all examples and outputs.
        """
        if joint:
            if not self.has_linear_mean:
                raise ValueError(
                    f"joint=True needs a mean that is linear in the outputs, which {self.name!r} does not say it has."
                )
            mean = self.predictive_mean(f)
            variances = spread.diagonal().reshape(f.shape)
            # the means come first, where there are other outputs
            places = torch.arange(f.numel(), device=f.device).reshape(f.shape)
            of_means = (places if f.ndim == 1 else places[..., : mean.shape[-1]]).flatten()
            spread, mean = spread[of_means][:, of_means], mean.flatten()
        else:
            variances = spread.diagonal(dim1=-2, dim2=-1).reshape(f.shape) if spread.ndim > f.ndim else spread
            mean, spread = self.moments(f, spread)
        if sigma_noise is not None:
            noise = self.noise_variance(f, variances, sigma_noise.to(f.dtype))
            is_matrix = spread.ndim > mean.ndim
            spread = spread + (torch.diag_embed(noise.reshape(spread.shape[:-1])) if is_matrix else noise)
        return mean, spread

    @abstractmethod
    def moments(self, f_mean: Float[Tensor, "N ... C"], f_var: Tensor) -> tuple[Float[Tensor, "N ... D"], Tensor]:
        """Mean of y, and the variance that it has because f is uncertain (without the observation noise).

        Args:
            f_mean: mean of the outputs.
            f_var: their variance, of the shape of `f_mean`, or the covariance of those on the last axis, `[N, ..., C, C]`.
        """

    @abstractmethod
    def noise_variance(
        self, f_mean: Float[Tensor, "N ... C"], f_var: Float[Tensor, "N ... C"], sigma_noise: float | Tensor
    ) -> Float[Tensor, "N ... D"]:
        """Variance of the observation noise, averaged over outputs f ~ N(f_mean, f_var), of the shape of y."""


def unit_columns(scale: Float[Tensor, "N ..."], mask: Tensor | None = None) -> Iterator[Float[Tensor, "N ..."]]:
    """Columns of a diagonal Hessian, given the square root of its diagonal."""
    flat = (scale if mask is None else scale * mask).reshape(len(scale), -1)
    for output in flat.count_nonzero(0).nonzero().flatten().tolist():
        column = torch.zeros_like(flat)
        column[:, output] = flat[:, output]
        yield column.reshape(scale.shape)


def random_signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """±1 with equal probability."""
    return torch.randint(0, 2, shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1


def standard_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws from N(0, 1), of the shape of a tensor."""
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor, in single precision where it has less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_same_shape(name: str, f: Tensor, y: Tensor) -> None:
    """Raise `InvalidBatchError` unless outputs and targets have the same shape."""
    if f.shape != y.shape:
        hint = " (add y.unsqueeze(-1))" if f.shape == (*y.shape, 1) else ""
        raise InvalidBatchError(
            f"the {name} likelihood needs outputs and targets of one shape, but the model gave {tuple(f.shape)} and the "
            f"targets are {tuple(y.shape)}{hint}."
        )


def check_floating(y: Tensor) -> None:
    """Raise `InvalidBatchError` unless the targets are floating point."""
    if not y.is_floating_point():
        raise InvalidBatchError(f"regression targets must be floating point, but they are {y.dtype}; use y.float().")
