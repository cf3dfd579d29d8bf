"""The sentence for inputs that a model's forward pass refuses, in place of the message of the library that it ran into."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import nn

from laplace_ws.errors import InvalidBatchError

_TORCH = str(Path(torch.__file__).parent)
_PACKAGE = str(Path(__file__).parent.parent)


def refused_inputs(model: nn.Module, inputs: str, error: Exception) -> InvalidBatchError | None:
    """The error for inputs on which a forward pass failed; None where the model's own code raised one, which says more.

    Args:
        model: the network.
        inputs: the inputs in words, as in "(12, 2) of torch.float32".
        error: what was raised, with its traceback.
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    is_of_torch = last.filename.startswith(_TORCH)
    if not is_of_torch and (last.line or "").lstrip().startswith("raise"):
        return None
    if not isinstance(error, RuntimeError) and not last.filename.startswith((_TORCH, _PACKAGE)):
        return None
    where = _failing_module(model, error)
    return InvalidBatchError(
        f"{type(model).__name__} cannot be run on inputs {inputs}: {where}; give inputs of the shape and type that the model was made "
        "for, one row per example, and a single example as x[None]."
    )


def _failing_module(model: nn.Module, error: Exception) -> str:
    """The innermost module that was being called."""
    names = {id(module): name for name, module in model.named_modules()}
    found: tuple[str, nn.Module] | None = None
    frame = error.__traceback__
    while frame is not None:
        module = frame.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(id(module)):
            found = names[id(module)], module
        frame = frame.tb_next
    if found is None:
        return "its forward pass refuses them"
    name, module = found
    described = repr(module)
    return f"its {name!r}, {described if len(described) <= 80 else type(module).__name__}, refuses what it is given"
