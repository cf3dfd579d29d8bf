"""Fits as laplace-torch writes them, and their sum over data sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_ws.compat.laplace_torch.likelihood import HALF_LOG_TWO_PI
from laplace_ws.curvature.totals import DataTotals
from laplace_ws.matrices import CurvatureMatrix, Dense, Diag, Kron, KronBlock, LowRank
from laplace_ws.posterior import Fit
from laplace_ws.posterior import Laplace as Posterior
from laplace_ws.posterior.fingerprint import Fingerprint


def state_of(la: Any) -> dict[str, Any]:
    """The state of a posterior as laplace-torch's `state_dict` has it: tensors and plain values.

    Raises:
        AttributeError: it is not fitted.
    """
    _ = la.posterior
    return {
        "mean": la.mean.detach(),
        "H": la.H_facs.kfacs if la._structure == "kron" else la.H,
        "loss": la.loss,
        "prior_mean": la.prior_mean.detach(),
        "prior_precision": la.prior_precision.detach(),
        "sigma_noise": la.sigma_noise.detach(),
        "n_data": la.n_data,
        "n_outputs": la.n_outputs,
        "likelihood": la.likelihood,
        "temperature": la.temperature,
        "enable_backprop": la.enable_backprop,
        "cls_name": type(la).__name__,
    }


def fit_of_state(la: Any, state: Mapping[str, Any], posterior: Posterior) -> Fit:
    """The fit that a state holds, for one of our posteriors that is like that of the state.

    Nothing in the state says what the model was besides the covered weights: it is taken to be what it is now.

    Raises:
        ValueError: the state is of another class, likelihood or number of weights.
    """
    for what, here, there in (
        ("class", type(la).__name__, state["cls_name"]),
        ("likelihood", la.likelihood, str(getattr(state["likelihood"], "value", state["likelihood"]))),
        ("number of weights", la.n_params, len(state["mean"])),
    ):
        if here != there:
            raise ValueError(f"the saved posterior has another {what}: {there}, and this one {here}.")
    likelihood, n_data, n_outputs = posterior.likelihood.at_noise(1.0), int(state["n_data"]), int(state["n_outputs"])
    n_targets = n_data * (n_outputs if likelihood.is_regression else 1)
    nll_sum = float(state["loss"]) + (n_targets * HALF_LOG_TWO_PI if likelihood.has_noise else 0.0)
    return Fit(
        H=_matrix(la, state["H"], posterior, n_data),
        totals=DataTotals(nll_sum, n_data, n_targets, (n_outputs,)),
        mean=posterior.network.flat_weights(),
        likelihood=likelihood,
        curvature=posterior.curvature,
        options=posterior.options,
        n_arguments=1,
        fingerprint=Fingerprint.of(posterior.model, posterior.subset),
    )


def _matrix(la: Any, H: Any, posterior: Posterior, n_data: int) -> CurvatureMatrix:
    shapes, factor = posterior.shapes, 1 / la._ef_factor
    if la._structure == "full":
        return Dense(shapes, la._sorted(H) * factor)
    if la._structure == "diag":
        return Diag(shapes, la._sorted(H) * factor)
    if la._structure == "lowrank":
        return LowRank(shapes, H[0], H[1] * factor)
    return Kron({name: _block(shape, F, n_data, factor) for (name, shape), F in zip(shapes.items(), H, strict=True)})


def _block(shape: torch.Size, factors: list[Tensor], n_data: int, factor: float) -> KronBlock:
    """A block of two factors, or of one: a matrix over all weights of the parameter."""
    B, A = factors[0] * factor, factors[1] if len(factors) == 2 else None
    of_one = KronBlock(shape, B, None, 0, diagonal_B=B.ndim == 1)
    if A is None:
        return of_one
    outputs_are_first = len(B) == shape[0] or len(B) * len(A) != shape.numel()
    B, A = (B, A) if outputs_are_first else (A, B)
    axes = (0,) if outputs_are_first else (1,)
    return KronBlock(shape, B, A, n_data, axes, diagonal_B=B.ndim == 1, diagonal_A=A.ndim == 1)


def merged(before: Fit, after: Fit) -> Fit:
    """The fit to the data of both, at the weights of the later one."""
    H = before.H
    if isinstance(H, Kron) and isinstance(after.H, Kron):
        # weighted by examples: what was loaded does not say how many inputs a layer had of each
        share = before.totals.n_examples / after.totals.n_examples
        H = Kron(
            {
                name: dataclasses.replace(block, n_inputs=after.H[name].n_inputs * share, approx=after.H[name].approx)
                for name, block in H.items()
            }
        )
    return dataclasses.replace(after, H=H + after.H, totals=before.totals + after.totals)
