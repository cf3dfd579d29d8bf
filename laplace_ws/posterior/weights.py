"""Temporarily replacing the weights of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from laplace_ws.curvature.inputs import ModelInputs, call_model, own_copy
from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.posterior.subset import WeightSubset


@contextmanager
def weights_in_place(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the model with these tensors in place of the parameters with these names, also where a parameter is registered twice.

    The parameters themselves are not written to, so what autograd keeps of them stays valid.
    """
    named = dict(model.named_parameters())
    by_identity = {id(named[name]): tensor for name, tensor in tensors.items()}
    places = [
        (module._parameters, key, p)
        for module in model.modules()
        for key, p in module._parameters.items()
        if p is not None and id(p) in by_identity
    ]
    try:
        for parameters, key, p in places:
            parameters[key] = by_identity[id(p)]  # type: ignore[assignment]
        yield
    finally:
        for parameters, key, p in places:
            parameters[key] = p


def check_replaceable(model: nn.Module, x: ModelInputs, subset: WeightSubset) -> None:
    """Run the model with copies in place of the covered parameters, and raise if it still reaches the parameters.

    Raises:
        UnsupportedParameterError: a parameter is read from somewhere other than its module.
    """
    parameters = subset.parameters(model)
    copies = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    with torch.enable_grad(), weights_in_place(model, copies):
        f = call_model(model, own_copy(x))
    reached = torch.autograd.grad(f.sum(), list(parameters.values()), allow_unused=True) if f.requires_grad else []
    for name, gradient in zip(parameters, reached, strict=False):
        if gradient is not None:
            raise UnsupportedParameterError(
                f"{name!r} is read from somewhere else than its module (a list of the model's own, a closure), so networks with sampled "
                'weights cannot be run; register it where it is read, or use pred_type="glm".'
            )
