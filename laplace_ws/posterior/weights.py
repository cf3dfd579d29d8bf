"""Other weights in a model, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def weights_in_place(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the model with these tensors in place of the parameters of their names, also where a parameter is registered twice.

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
