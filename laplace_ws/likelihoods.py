"""Likelihoods p(y | f) of network outputs f: log probability, square root of the Hessian, label samples.

Outputs are `[N, C]` (one loss term per example), `[N, T, C]` (T terms per example) or, for a single output, `[N]`. Losses are
**sums** over examples and terms, in nats. A *column* is a tensor of the shape of f: a vector of loss space for each example.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.errors import InvalidBatchError


class Likelihood(ABC):
    """p(y | f), and what curvature needs of it.

    Attributes:
        name: the name by which `make_likelihood` knows it.
        has_noise: whether it has an observation noise σ.
        sigma_noise: σ in the units of the targets; 1 where there is no noise.
    """

    name: str
    has_noise: bool = False
    sigma_noise: float = 1.0

    @abstractmethod
    def check(self, f: Tensor, y: Tensor) -> None:
        """Raise `InvalidBatchError` if outputs and targets do not fit this likelihood."""

    @abstractmethod
    def nll_sum(self, f: Float[Tensor, "N ..."], y: Tensor) -> Float[Tensor, ""]:
        """Negative log likelihood −Σ_n Σ_t log p(y_nt | f_nt), normalising constants included."""

    @abstractmethod
    def hessian_columns(self, f: Float[Tensor, "N ..."]) -> Iterator[Float[Tensor, "N ..."]]:
        """Columns s_c with Σ_c s_c s_cᵀ = ∇²_f(−log p) for each example; those that vanish are left out."""

    def projected_column(self, f: Float[Tensor, "N ..."], generator: torch.Generator | None) -> Float[Tensor, "N ..."]:
        """Σ_c ε_c s_c with fresh signs ε_c = ±1 for each example: its square has the Hessian as its mean."""
        column = torch.zeros_like(f)
        for root in self.hessian_columns(f):
            column += root * _signs(f.shape[:1] + (1,) * (f.ndim - 1), f, generator)
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

    def at_noise(self, sigma_noise: float) -> Likelihood:
        """This likelihood with another σ; itself, where there is no noise."""
        return self

    def nll_at_noise(self, unit_nll_sum: Tensor, n_targets: float, sigma_noise: Tensor) -> Tensor:
        """Turn the summed NLL at σ = 1 into the one at `sigma_noise` (the same, where there is no noise)."""
        return unit_nll_sum

    def curvature_scale(self, sigma_noise: Tensor, curvature: str) -> Tensor:
        """Factor between the curvature at σ = 1 and at `sigma_noise`."""
        return torch.ones_like(sigma_noise)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _unit_columns(scale: Float[Tensor, "N ..."]) -> Iterator[Float[Tensor, "N ..."]]:
    """Columns of a diagonal Hessian, given the square root of its diagonal."""
    flat = scale.reshape(len(scale), -1)
    for output in flat.count_nonzero(0).nonzero().flatten().tolist():
        column = torch.zeros_like(flat)
        column[:, output] = flat[:, output]
        yield column.reshape(scale.shape)


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class _Ranks:
    """Softmax probabilities from the likeliest class down, and the root of diag(p) − ppᵀ that follows from them.

    "Is it the class of rank j, given that it is none above?" is a question with two answers, and the covariance of a label is the sum over
    these questions: s_j = scale_j (e_j − p_below / below_j). That is the Cholesky factor with the classes in this order, of C − 1 columns
    [Tanabe & Sagae 1992]; the order lets its columns vanish together where the model is sure, and no term cancels.

    Attributes:
        classes: class of each rank, `[N, T, C]`.
        p: probability of each rank.
        below: summed probability of the ranks below.
        scale: √(p_j below_j / (p_j + below_j)).
    """

    classes: Int[Tensor, "N T C"]
    p: Float[Tensor, "N T C"]
    below: Float[Tensor, "N T C"]
    scale: Float[Tensor, "N T C"]

    @classmethod
    def of(cls, f: Float[Tensor, "N ... C"]) -> _Ranks:
        """Rank the classes of each example and term."""
        logits = _at_least_float32(f).reshape(len(f), -1, f.shape[-1])
        p, classes = logits.softmax(-1).sort(-1, descending=True)
        from_here = p.flip(-1).cumsum(-1).flip(-1)
        below = F.pad(from_here[..., 1:], (0, 1))
        scale = (p * (below / from_here)).sqrt()
        return cls(classes, p, below, scale.nan_to_num())  # 0/0 where the probabilities end in zeros

    def column(self, term: int, rank: int) -> Float[Tensor, "N C"]:
        """s of a rank, in the order of classes."""
        ranked = torch.zeros_like(self.p[:, term])
        scale = self.scale[:, term, rank]
        ranked[:, rank] = scale
        share = self.p[:, term, rank + 1 :] / self.below[:, term, rank, None]
        ranked[:, rank + 1 :] = -scale[:, None] * share.nan_to_num()
        return self._by_class(ranked, term)

    def variances(self, term: int) -> Float[Tensor, " C"]:
        """Σ_n p(1 − p) of each class."""
        p = self.p[:, term]
        above = F.pad(p.cumsum(-1)[:, :-1], (1, 0))
        return self._by_class(p * (above + self.below[:, term]), term).sum(0)

    def _by_class(self, ranked: Float[Tensor, "N C"], term: int) -> Float[Tensor, "N C"]:
        return torch.empty_like(ranked).scatter_(-1, self.classes[:, term], ranked)


def _check_same_shape(name: str, f: Tensor, y: Tensor) -> None:
    if f.shape != y.shape:
        hint = " (add y.unsqueeze(-1))" if f.shape == (*y.shape, 1) else ""
        raise InvalidBatchError(
            f"the {name} likelihood needs outputs and targets of one shape, but the model gave {tuple(f.shape)} and the "
            f"targets are {tuple(y.shape)}{hint}."
        )


class Categorical(Likelihood):
    """Softmax over the last dimension of f; labels are class indices of shape f.shape[:-1]."""

    name = "classification"

    def check(self, f: Tensor, y: Tensor) -> None:
        """See `Likelihood.check`."""
        if f.ndim not in (2, 3) or f.shape[-1] < 2:
            mend = (
                "flatten the positions and put the classes last (f.flatten(2).mT for [N, C, H, W])"
                if f.ndim > 3
                else 'use likelihood="binary" for a single logit'
            )
            raise InvalidBatchError(
                f"the classification likelihood needs outputs [N, C] or [N, T, C] with C of at least 2, but the model gave "
                f"{tuple(f.shape)}; {mend}."
            )
        if y.shape != f.shape[:-1]:
            raise InvalidBatchError(
                f"the classification likelihood needs labels of shape {tuple(f.shape[:-1])} for outputs {tuple(f.shape)}, "
                f"but they are {tuple(y.shape)}."
            )
        if y.is_floating_point() or y.dtype == torch.bool:
            raise InvalidBatchError(f"class labels must be integers, but they are {y.dtype}; use y.long().")
        if y.numel() and (y.min() < 0 or y.max() >= f.shape[-1]):
            raise InvalidBatchError(
                f"class labels must lie in 0 … {f.shape[-1] - 1} for a model with {f.shape[-1]} outputs, but they span "
                f"{int(y.min())} … {int(y.max())}; renumber the labels or give the model more outputs."
            )

    def nll_sum(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.nll_sum`."""
        return F.cross_entropy(f.reshape(-1, f.shape[-1]), y.reshape(-1).long(), reduction="sum")

    def hessian_columns(self, f: Tensor) -> Iterator[Tensor]:
        """C − 1 columns for each of the T terms in turn, see `_Ranks`: Σ_c s_c s_cᵀ = diag(p) − ppᵀ.

        A column is left out where, for every class, its part of Σ_n p_c(1 − p_c) over the batch is below the rounding of that sum.
        """
        ranks = _Ranks.of(f)
        eps = torch.finfo(ranks.p.dtype).eps
        for term in range(ranks.p.shape[1]):
            variances = ranks.variances(term)
            for rank in ranks.scale[:, term].count_nonzero(0).nonzero().flatten().tolist():
                of_term = ranks.column(term, rank)
                if (of_term.square().sum(0) <= eps * variances).all():
                    continue
                column = torch.zeros_like(ranks.p)
                column[:, term] = of_term
                yield column.reshape(f.shape).to(f.dtype)

    def projected_column(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Likelihood.projected_column`; all columns and terms in one go, at the cost of a cumulative sum."""
        ranks = _Ranks.of(f)
        signed = ranks.scale * _signs(ranks.scale.shape, ranks.scale, generator)
        shares = (signed / ranks.below).nan_to_num()[..., :-1].cumsum(-1)
        ranked = signed - ranks.p * F.pad(shares, (1, 0))
        return torch.empty_like(ranked).scatter_(-1, ranks.classes, ranked).reshape(f.shape).to(f.dtype)

    def sampled_column(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Likelihood.sampled_column`."""
        p = f.softmax(-1)
        y = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).reshape(p.shape[:-1])
        return self._gradient(p, y)

    def gradient_column(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.gradient_column`."""
        return self._gradient(f.softmax(-1), y)

    def predictive_mean(self, f: Tensor) -> Tensor:
        """Class probabilities."""
        return f.softmax(-1)

    @staticmethod
    def _gradient(p: Tensor, y: Tensor) -> Tensor:
        return p - F.one_hot(y.long(), p.shape[-1]).to(p.dtype)


class Gaussian(Likelihood):
    """y = f + σ ε with ε ~ N(0, I); targets have the shape of f.

    Args:
        sigma_noise: standard deviation σ of the noise, in the units of the targets.
    """

    name = "regression"
    has_noise = True

    def __init__(self, sigma_noise: float = 1.0):
        if not sigma_noise > 0:
            raise ValueError(f"sigma_noise must be positive, got {sigma_noise}.")
        self.sigma_noise = float(sigma_noise)

    def check(self, f: Tensor, y: Tensor) -> None:
        """See `Likelihood.check`."""
        _check_same_shape("regression", f, y)
        if not y.is_floating_point():
            raise InvalidBatchError(
                f"regression targets must be floating point, but they are {y.dtype}; use y.float()."
            )

    def nll_sum(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.nll_sum`."""
        half_square_error = 0.5 * (f - y).square().sum()
        return half_square_error / self.sigma_noise**2 + y.numel() * (math.log(self.sigma_noise) + _HALF_LOG_TWO_PI)

    def hessian_columns(self, f: Tensor) -> Iterator[Tensor]:
        """Unit vectors divided by σ."""
        return _unit_columns(torch.full_like(f, 1 / self.sigma_noise))

    def sampled_column(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Likelihood.sampled_column`."""
        return torch.randn(f.shape, dtype=f.dtype, device=f.device, generator=generator) / self.sigma_noise

    def gradient_column(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.gradient_column`."""
        return (f - y) / self.sigma_noise**2

    def predictive_mean(self, f: Tensor) -> Tensor:
        """The outputs themselves."""
        return f

    def at_noise(self, sigma_noise: float) -> Gaussian:
        """See `Likelihood.at_noise`."""
        other = copy.copy(self)
        other.sigma_noise = float(sigma_noise)
        return other

    def nll_at_noise(self, unit_nll_sum: Tensor, n_targets: float, sigma_noise: Tensor) -> Tensor:
        """See `Likelihood.nll_at_noise`."""
        half_square_error = unit_nll_sum - n_targets * _HALF_LOG_TWO_PI
        return half_square_error / sigma_noise**2 + n_targets * (sigma_noise.log() + _HALF_LOG_TWO_PI)

    def curvature_scale(self, sigma_noise: Tensor, curvature: str) -> Tensor:
        """σ⁻² for the GGN; σ⁻⁴ for the empirical Fisher, whose gradients themselves carry σ⁻²."""
        return sigma_noise ** (-4 if curvature == "ef" else -2)

    def __repr__(self) -> str:
        return f"Gaussian(sigma_noise={self.sigma_noise:g})"


class Bernoulli(Likelihood):
    """Independent binary targets y ∈ {0, 1} with logits f of the same shape."""

    name = "binary"

    def check(self, f: Tensor, y: Tensor) -> None:
        """See `Likelihood.check`."""
        _check_same_shape("binary", f, y)
        if y.numel() and not ((y == 0) | (y == 1)).all():
            raise InvalidBatchError(
                f"binary targets must be 0 or 1, but they span {y.min().item():g} … {y.max().item():g}; recode them, or use "
                'likelihood="classification" for more classes.'
            )

    def nll_sum(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.nll_sum`."""
        return F.binary_cross_entropy_with_logits(f, y.to(f.dtype), reduction="sum")

    def hessian_columns(self, f: Tensor) -> Iterator[Tensor]:
        """Unit vectors times √(p(1 − p)), in a form that does not lose small p."""
        return _unit_columns((F.logsigmoid(f) + F.logsigmoid(-f)).mul(0.5).exp())

    def sampled_column(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Likelihood.sampled_column`."""
        p = f.sigmoid()
        return p - torch.bernoulli(p, generator=generator)

    def gradient_column(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.gradient_column`."""
        return f.sigmoid() - y.to(f.dtype)

    def predictive_mean(self, f: Tensor) -> Tensor:
        """Probabilities of y = 1."""
        return f.sigmoid()


_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_LIKELIHOODS: dict[str, type[Likelihood]] = {kind.name: kind for kind in (Categorical, Gaussian, Bernoulli)}


def make_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """Turn "classification", "regression" or "binary" into its likelihood; a `Likelihood` passes through."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if likelihood not in _LIKELIHOODS:
        raise ValueError(f"unknown likelihood {likelihood!r}: choose one of {', '.join(map(repr, _LIKELIHOODS))}.")
    return _LIKELIHOODS[likelihood]()
