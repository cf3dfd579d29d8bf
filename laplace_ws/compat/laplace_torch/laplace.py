"""`Laplace`: a posterior by the names of its weights and of its structure."""

from __future__ import annotations

from typing import Any

from torch import nn

from laplace_ws.compat.laplace_torch import lllaplace, subnetlaplace
from laplace_ws.compat.laplace_torch.baselaplace import (
    BaseLaplace,
    DiagLaplace,
    FullLaplace,
    FunctionalLaplace,
    KronLaplace,
    LowRankLaplace,
)
from laplace_ws.compat.laplace_torch.utils.enums import HessianStructure, Likelihood, SubsetOfWeights

CLASSES: dict[tuple[str, str], Any] = {
    kind._key: kind
    for kind in (
        FullLaplace,
        KronLaplace,
        DiagLaplace,
        LowRankLaplace,
        FunctionalLaplace,
        lllaplace.FullLLLaplace,
        lllaplace.KronLLLaplace,
        lllaplace.DiagLLLaplace,
        lllaplace.FunctionalLLLaplace,
        subnetlaplace.FullSubnetLaplace,
        subnetlaplace.DiagSubnetLaplace,
    )
}
"""The class for each choice of weights and structure."""


def Laplace(
    model: nn.Module,
    likelihood: Likelihood | str,
    subset_of_weights: SubsetOfWeights | str = SubsetOfWeights.LAST_LAYER,
    hessian_structure: HessianStructure | str = HessianStructure.KRON,
    *args: Any,
    **kwargs: Any,
) -> BaseLaplace:
    """A posterior, not fitted yet.

    Args:
        model: the network.
        likelihood: "classification", "regression" or "reward_modeling".
        subset_of_weights: "last_layer", "all" or "subnetwork".
        hessian_structure: "kron", "diag", "full" or "lowrank".
        *args, **kwargs: of the class.

    Raises:
        ValueError: there is no such posterior.
    """
    key = SubsetOfWeights(subset_of_weights).value, HessianStructure(hessian_structure).value
    if key not in CLASSES:
        offered = [structure for subset, structure in CLASSES if subset == key[0]]
        raise ValueError(f"there is no {key[1]!r} posterior of {key[0]!r}; for these weights choose one of {offered}.")
    return CLASSES[key](model, likelihood, *args, **kwargs)
