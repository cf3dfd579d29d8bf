"""Likelihoods p(y | f) of network outputs f: log probability, square root of the Hessian, label samples, predictions.

Outputs are `[N, C]` (one loss term per example), `[N, T, C]` (T terms per example), for regression and binary targets any other
shape (`[N, C, H, W]`: images), or, for a single output, `[N]`. Losses are **sums** over examples and terms, in nats. A *column* is a
tensor of the shape of f: a vector of loss space for each example.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from laplace_ws.likelihoods.base import Likelihood, RegressionLikelihood
from laplace_ws.likelihoods.bernoulli import Bernoulli
from laplace_ws.likelihoods.categorical import Categorical
from laplace_ws.likelihoods.gaussian import Gaussian, HeteroscedasticGaussian
from laplace_ws.likelihoods.preference import BradleyTerry
from laplace_ws.registry import Registry
from laplace_ws.values import shown

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "BradleyTerry",
    "Categorical",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "RegressionLikelihood",
    "likelihood_from_state",
    "make_likelihood",
    "register_likelihood",
]

LIKELIHOODS: Registry[type[Likelihood]] = Registry(
    "likelihood",
    {kind.name: kind for kind in (Categorical, Gaussian, HeteroscedasticGaussian, Bernoulli, BradleyTerry)},
)


def register_likelihood(kind: type[Likelihood]) -> None:
    """Make `likelihood=kind.name` refer to a likelihood of your own, and let posterior files that use it be read.

    Args:
        kind: its class, whose `options()` are the arguments that recreate an instance.

    Raises:
        TypeError: it is no subclass of `Likelihood`, or has no name.
        ValueError: another has its name.
    """
    if not isinstance(kind, type) or not issubclass(kind, Likelihood) or not hasattr(kind, "name"):  # pyright: ignore
        raise TypeError(f"register_likelihood takes a subclass of Likelihood with a name, got {kind!r}.")
    LIKELIHOODS.register(kind.name, kind)


def make_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """Turn "classification", "regression", "heteroscedastic_regression", "binary" or "reward_modeling" into its likelihood.

    A `Likelihood` passes through.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    return likelihood_from_state({"name": likelihood})


def likelihood_from_state(state: Mapping[str, Any]) -> Likelihood:
    """The likelihood that a `Likelihood.state()` describes.

    Raises:
        TypeError: it is no mapping with a name, or has an option that the likelihood does not take.
        ValueError: it is neither one of the toolkit's own nor registered.
    """
    if not isinstance(state, Mapping) or "name" not in state:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"the state of a likelihood is a mapping with its name, as Likelihood.state() gives it, got {shown(state)}."
        )
    options = dict(state)
    kind = LIKELIHOODS[options.pop("name")]
    known = inspect.signature(kind).parameters
    for option in options:
        if option not in known:
            raise TypeError(
                f"the {kind.name} likelihood has no option {option!r}; it has {', '.join(known) or 'none'}."
            )
    return kind(**options)
