"""Which models can be covered at all: modules of torch, with real parameters that exist, whose operations can be seen."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError
from laplace_ws.values import shown


def check_module(model: object) -> None:
    """Raise unless a model is a module of torch whose parameters are real numbers in memory.

    Raises:
        TypeError: it is no `nn.Module`.
        UnsupportedParameterError: names the parameter that has no shape yet, or is complex.
        InvalidBatchError: names the parameter that has no values.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else shown(model)
        raise TypeError(f"the model must be a torch.nn.Module, an instance of its class, got {what}.")
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if is_lazy(p):
            raise UnsupportedParameterError(
                f"{name!r} has no shape yet, as a lazy module has not been called; run the model on a batch first."
            )
        if p.is_meta:
            raise InvalidBatchError(
                f"{name!r} is on the meta device and has no values; load the model's weights on a device first."
            )
        if p.is_complex():
            raise UnsupportedParameterError(
                f"{name!r} is complex ({p.dtype}), and posteriors are of real weights; keep its real and imaginary parts as two "
                "parameters, or freeze it (requires_grad_(False))."
            )


def check_visible(model: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Raise if covered parameters lie in a part of the model whose operations cannot be seen one by one.

    Args:
        model: the network.
        parameters: those that are covered.

    Raises:
        UnsupportedParameterError: names the part, and what to pass in its place.
    """
    covered = {id(p) for p in parameters}
    for name, module in model.named_modules():
        found = _hidden_by(module)
        if found is not None and any(id(p) in covered for p in module.parameters()):
            what, mend = found
            where = f"the model, {type(module).__name__}," if not name else f"{name!r}, {type(module).__name__},"
            raise UnsupportedParameterError(f"{where} is {what}, which hides its operations; {mend}.")


def _hidden_by(module: nn.Module) -> tuple[str, str] | None:
    """What a module is, if it hides its operations, and how to do without."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted or traced by torch.jit", "give the module that it was made from"
    if hasattr(module, "_orig_mod"):
        return "compiled by torch.compile", "give the module itself, its _orig_mod, whose weights are the same"
    if module._compiled_call_impl is not None:
        return (
            "compiled by its compile()",
            "give a copy that is not, or compile after the fit with torch.compile(model)",
        )
    return None
