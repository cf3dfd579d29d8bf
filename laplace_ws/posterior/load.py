"""Posteriors by the names of laplace-torch, and from files."""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from laplace_ws import saved
from laplace_ws.curvature import Backend
from laplace_ws.files import FileFormatError, load_tensors
from laplace_ws.likelihoods import Likelihood, likelihood_from_state
from laplace_ws.posterior import files
from laplace_ws.posterior.laplace import Laplace
from laplace_ws.values import path_of

KronLaplace: functools.partial[Laplace] = functools.partial(Laplace, hessian_structure="kron")
"""`Laplace` with Kronecker factors, by its name in laplace-torch."""
EkfacLaplace: functools.partial[Laplace] = functools.partial(Laplace, hessian_structure="ekfac")
"""`Laplace` with eigenvalue-corrected Kronecker factors."""
DiagLaplace: functools.partial[Laplace] = functools.partial(Laplace, hessian_structure="diag")
"""`Laplace` with a diagonal curvature, by its name in laplace-torch."""
FullLaplace: functools.partial[Laplace] = functools.partial(Laplace, hessian_structure="full")
"""`Laplace` with the full curvature, by its name in laplace-torch."""
LowRankLaplace: functools.partial[Laplace] = functools.partial(Laplace, hessian_structure="lowrank")
"""`Laplace` with the leading eigenpairs of the curvature, by its name in laplace-torch."""


def load_posterior(
    path: str | Path,
    model: nn.Module,
    *,
    likelihood: Likelihood | None = None,
    backend: str | Backend | None = None,
) -> Laplace:
    """Load the posterior that `Laplace.save` wrote, with its options, for a model like its own.

    Args:
        path: the file.
        model: a network with the same parameters; its weights are left alone (`load_mean` puts those of the fit in their place).
        likelihood: needed where it is a class of your own that is not registered.
        backend: what runs the model; default: as saved.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is damaged, not a posterior, or in another format.
        ValueError: the model has other parameters.
    """
    state = load_tensors(path_of("path", path), "a posterior")
    with _named(path):
        files.check_format(state)
        with files.damage_explained():
            files.check_model(model, state)
            options = dict(saved.entry(state, "options", Mapping))
            saved_likelihood = saved.entry(options, "likelihood", Mapping)
            del options["likelihood"]
            la = Laplace(
                model,
                likelihood or _saved_likelihood(saved_likelihood),
                subset_of_weights=files.saved_subset(state, next(model.parameters()).device),
                backend=backend or saved.entry(state, "backend", str),
                dict_key_x=saved.entry(state, "dict_key_x", str),
                dict_key_y=saved.entry(state, "dict_key_y", str),
                memory_budget=saved.whole_number(state, "memory_budget", 1),
                **options,
            )
        la.load_state_dict(state)
    return la


@contextmanager
def _named(path: str | Path) -> Generator[None, None, None]:
    """Say which file it is that is damaged or does not fit."""
    try:
        yield
    except FileFormatError as error:
        raise FileFormatError(f"'{path}': {error}") from error
    except ValueError as error:
        raise type(error)(f"'{path}': {error}") from error


def _saved_likelihood(state: Mapping[str, Any]) -> Likelihood:
    try:
        return likelihood_from_state(state)
    except ValueError as error:
        raise ValueError(
            f"the saved posterior has a likelihood of your own, {state['name']!r}; pass one like it as likelihood=, or register it."
        ) from error
