"""`Laplace`, which makes the posterior that is asked for, and `load_posterior`, which makes the one that was saved."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from laplace_ws.curvature import Backend
from laplace_ws.files import load_tensors
from laplace_ws.likelihoods import Likelihood, likelihood_from_state
from laplace_ws.posterior.base import BaseLaplace
from laplace_ws.posterior.diag import DiagLaplace
from laplace_ws.posterior.ekfac import EkfacLaplace
from laplace_ws.posterior.files import check_format, check_model, damage_explained, saved_subset
from laplace_ws.posterior.full import FullLaplace
from laplace_ws.posterior.kron import KronLaplace
from laplace_ws.posterior.lowrank import LowRankLaplace

STRUCTURES: dict[str, type[BaseLaplace]] = {
    cls.hessian_structure: cls for cls in (KronLaplace, EkfacLaplace, DiagLaplace, FullLaplace, LowRankLaplace)
}

_OWN_OPTIONS = {"kfac_approx": ("kron", "ekfac"), "factor_precision": ("kron", "ekfac"), "rank": ("lowrank",)}
_BY_CURVATURE = "choose by curvature=, kfac_approx=, mc_samples= and backend="
_IN_LAPLACE_TORCH = {
    "enable_backprop": "pass backprop=True to the prediction",
    "backend_kwargs": _BY_CURVATURE,
    "asdl_fisher_kwargs": _BY_CURVATURE,
    "feature_reduction": "reduce the features in the model",
}
"""Options that users of laplace-torch know, and what takes their place."""


def Laplace(
    model: nn.Module,
    likelihood: str | Likelihood,
    subset_of_weights: str | Sequence[str] = "all",
    hessian_structure: str = "kron",
    **options: Any,
) -> BaseLaplace:
    """Make a Laplace posterior.

    Args:
        model: a trained network.
        likelihood: "classification", "regression", "heteroscedastic_regression", "binary" or a `Likelihood`.
        subset_of_weights: "all", "last_layer", "subnetwork", or patterns of names of parameters or modules.
        hessian_structure: "kron", "ekfac", "diag", "full" or "lowrank".
        **options: see `BaseLaplace` and the class of the structure.
    """
    for option, structures in _OWN_OPTIONS.items():
        if option in options and hessian_structure in STRUCTURES and hessian_structure not in structures:
            raise ValueError(
                f"{option} is for hessian_structure={' and '.join(map(repr, structures))}, not {hessian_structure!r}; leave it out."
            )
    if hessian_structure not in STRUCTURES:
        raise ValueError(
            f"unknown hessian_structure {hessian_structure!r}: choose one of {', '.join(map(repr, STRUCTURES))}."
        )
    check_options(STRUCTURES[hessian_structure], options)
    return STRUCTURES[hessian_structure](model, likelihood, subset_of_weights=subset_of_weights, **options)


def check_options(structure: type[BaseLaplace], options: Iterable[str]) -> None:
    """Raise `TypeError` for an option that a posterior does not have, with what might be meant."""
    known = {name for cls in structure.__mro__ for name in inspect.signature(cls.__init__).parameters}
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, [*known, "hessian_structure"], n=1)
            mend = _IN_LAPLACE_TORCH.get(option) or (
                f"did you mean {near[0]!r}" if near else f"see {structure.__name__}"
            )
            raise TypeError(f"Laplace has no option {option!r}; {mend}.")


def load_posterior(
    path: str | Path,
    model: nn.Module,
    *,
    likelihood: Likelihood | None = None,
    backend: str | Backend | None = None,
) -> BaseLaplace:
    """The posterior that `BaseLaplace.save` wrote, with its options, beside a model like its own.

    Args:
        path: the file.
        model: a network with the same parameters; its weights are left alone (`load_mean` puts those of the fit in their place).
        likelihood: where it is a class of your own.
        backend: who runs the model; default: as saved.

    Raises:
        FileFormatError: the file is damaged, no posterior, or one of another format.
        ValueError: the model has other parameters.
    """
    state = load_tensors(path, "a posterior")
    check_format(state, f"'{path}'")
    with damage_explained():
        check_model(model, state)
        options = dict(state["options"])
        structure = STRUCTURES[options.pop("hessian_structure")]
        saved_likelihood = options.pop("likelihood")
        la = structure(
            model,
            likelihood or _likelihood(saved_likelihood),
            subset_of_weights=saved_subset(state, next(model.parameters()).device),
            backend=backend or state["backend"],
            dict_key_x=state["dict_key_x"],
            dict_key_y=state["dict_key_y"],
            memory_budget=state["memory_budget"],
            **options,
        )
    la.load_state_dict(state)
    return la


def _likelihood(state: Mapping[str, Any]) -> Likelihood:
    try:
        return likelihood_from_state(state)
    except ValueError as error:
        raise ValueError(
            f"the saved posterior has a likelihood of your own, {state['name']!r}; pass one like it as likelihood=."
        ) from error
