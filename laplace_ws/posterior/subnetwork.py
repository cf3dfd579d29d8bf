"""Choices of a subnetwork: the weights that a posterior covers, as indices into the flat vector of all that require grad.

`Laplace(model, likelihood, subset_of_weights="subnetwork", subnetwork_indices=largest_magnitude(model, 100), hessian_structure="full")`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from laplace_ws.curvature.backend import trainable_parameters
from laplace_ws.curvature.batches import Data
from laplace_ws.likelihoods import Likelihood, make_likelihood
from laplace_ws.posterior.laplace import Laplace
from laplace_ws.posterior.subset import make_subset
from laplace_ws.posterior.swag import swag_variances
from laplace_ws.values import generator_or_none, shown, whole_number


def largest_magnitude(model: nn.Module, n_weights: int) -> Int[Tensor, " D"]:
    """The weights of largest magnitude.

    Args:
        model: a trained network.
        n_weights: D.
    """
    weights = torch.cat([p.detach().flatten() for p in trainable_parameters(model).values()])
    return _top(weights.abs(), n_weights)


def largest_variance(la: Laplace, n_weights: int) -> Int[Tensor, " D"]:
    """The weights of largest variance under a diagonal posterior of all weights [Daxberger et al. 2021, "Subnetwork inference"].

    Args:
        la: a fitted posterior with `hessian_structure="diag"` over all weights of the model.
        n_weights: D.
    """
    if not isinstance(la, Laplace):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f'largest_variance takes a fitted posterior with hessian_structure="diag", got {shown(la)}.')
    if la.hessian_structure != "diag" or la.n_params != sum(p.numel() for p in trainable_parameters(la.model).values()):
        raise ValueError(
            'largest_variance needs a diagonal posterior of all weights; fit one with hessian_structure="diag" and subset_of_weights="all".'
        )
    return _top(1 / la.posterior_precision, n_weights)


def largest_swag_variance(
    model: nn.Module,
    train_loader: Data,
    n_weights: int,
    likelihood: str | Likelihood = "classification",
    **options: Any,
) -> Int[Tensor, " D"]:
    """The weights of largest variance along further SGD at a constant learning rate, as diagonal SWAG takes it [Maddox et al. 2019].

    Args:
        model: a trained network, which is left as it is.
        train_loader: the training data.
        n_weights: D.
        likelihood: whose negative log likelihood, a mean over the examples of a batch, SGD follows.
        **options: `n_snapshots`, `epochs_between`, `lr`, `momentum` and `weight_decay` of `swag.swag_variances`.
    """
    likelihood = make_likelihood(likelihood)
    _check_number(n_weights, sum(p.numel() for p in trainable_parameters(model).values()))
    variances = swag_variances(model, train_loader, lambda f, y: likelihood.nll_sum(f, y) / len(y), **options)
    return _top(variances, n_weights)


def random_subnetwork(model: nn.Module, n_weights: int, generator: torch.Generator | None = None) -> Int[Tensor, " D"]:
    """Weights chosen at random, without replacement.

    Args:
        model: the network.
        n_weights: D.
        generator: source of randomness, on the CPU; default: torch's own.
    """
    n_params = sum(p.numel() for p in trainable_parameters(model).values())
    _check_number(n_weights, n_params)
    generator = generator_or_none("generator", generator)
    return torch.randperm(n_params, generator=generator)[:n_weights].sort().values


def named_weights(model: nn.Module, patterns: Sequence[str]) -> Int[Tensor, " D"]:
    """All weights of the parameters and modules whose names match a pattern, as in `["head", "*.bias"]`."""
    if isinstance(patterns, str):
        raise TypeError(f"patterns must be a list of patterns of names, such as [{patterns!r}], got a string.")
    chosen = make_subset(model, patterns).parameter_shapes
    is_chosen = [torch.full((p.numel(),), name in chosen) for name, p in trainable_parameters(model).items()]
    return torch.cat(is_chosen).nonzero().flatten()


def _top(scores: Tensor, n_weights: int) -> Int[Tensor, " D"]:
    _check_number(n_weights, len(scores))
    return scores.topk(n_weights).indices.sort().values.cpu()


def _check_number(n_weights: int, n_params: int) -> None:
    n_weights = whole_number("n_weights", n_weights)
    if not 1 <= n_weights <= n_params:
        raise ValueError(f"a subnetwork has from 1 to {n_params} weights here, not {n_weights}.")
