"""Whether a model still computes the function of a fit: its outputs on a small batch that is made from a recipe, not from data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws import saved
from laplace_ws.curvature.backend import evaluation_mode
from laplace_ws.curvature.forward import precision
from laplace_ws.curvature.inputs import ModelInputs, StructuredInputs, call_model
from laplace_ws.files import FileFormatError
from laplace_ws.posterior.fingerprint import some_entries
from laplace_ws.threads import SharedSetting

N_EXAMPLES = 2
"""Examples of the batch; it costs little more than one, and a layer that reads a whole batch would show."""
_SEQUENCES = ("arguments", "tuple", "list")
_LARGEST = 2**31
"""Entries that a tensor of the batch may have, so that a damaged file does not ask for more memory than there is."""
_TOLERANCES = ((torch.finfo(torch.float64).eps, 1e-5), (torch.finfo(torch.float32).eps, 1e-3), (math.inf, 3e-2))
"""Up to which machine precision which relative difference of the outputs may be rounding, as that of another device."""

Recipe = Mapping[str, Any]
"""Of one part of the inputs, as plain values: {"tensor": {"shape", "dtype", "largest"}}, {"tuple": parts}, {"list": parts},
{"dict": parts by key}, {"value": None, a bool, a number or a string}, or {"arguments": parts} for a row (x1, x2, …)."""


@dataclass(frozen=True)
class FunctionFingerprint:
    """What a model gives on a batch of normal numbers, whole numbers up to the largest seen, and alternating booleans.

    Attributes:
        recipe: of the batch.
        outputs: at some entries, float64 on the CPU.
    """

    recipe: Recipe
    outputs: Float[Tensor, " K"]

    @classmethod
    def of(cls, model: nn.Module, x: ModelInputs) -> FunctionFingerprint | None:
        """The fingerprint of a model as it is; None where no batch like x can be made, or the model gives nothing finite on it.

        Args:
            model: the network.
            x: a batch of its inputs, of which shapes and types are kept, and of whole numbers the largest.
        """
        recipe = _recipe(x)
        if recipe is None:
            return None
        try:
            outputs, _ = _outputs(model, recipe)
        except Exception:  # it may raise anything for inputs that are no data
            return None
        return cls(recipe, outputs) if outputs.isfinite().all() else None

    def check(self, model: nn.Module) -> None:
        """Raise `ValueError` unless a model with the same weights computes the same function."""
        name = type(model).__name__
        mend = "put back the modules and settings that it had then (its activations, for instance), or fit anew."
        try:
            found, eps = _outputs(model, self.recipe)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"{name} has the weights of the fit, but fails on a fixed batch on which it did not then ({error}); {mend}"
            ) from error
        if found.shape != self.outputs.shape:
            raise ValueError(
                f"{name} has the weights of the fit, but gives outputs of another shape on a fixed batch; {mend}"
            )
        difference = (found - self.outputs).norm() / torch.maximum(self.outputs.norm(), found.norm())
        if (found != self.outputs).any() and not difference <= next(t for limit, t in _TOLERANCES if eps <= limit):
            raise ValueError(
                f"{name} has the weights of the fit, but computes another function: its outputs on a fixed batch differ from those in the "
                f"fit by {100 * difference.item():.2g} %; {mend}"
            )

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, from which `from_state` restores it."""
        return {"recipe": self.recipe, "outputs": self.outputs}

    @classmethod
    def from_state(cls, state: Any) -> FunctionFingerprint:
        """Restore what `state` gave.

        Raises:
            FileFormatError: it is something else.
        """
        recipe, outputs = saved.entry(state, "recipe", Mapping), saved.entry(state, "outputs", Tensor)
        _check_recipe(recipe)
        outputs = saved.floats(outputs, "outputs on the fixed batch", (outputs.numel(),))
        return cls(recipe, outputs.double().cpu())


def _recipe(x: Any, n: int | None = None) -> Recipe | None:
    """How to make inputs like x; None for objects, whose insides are not known.

    Args:
        x: the inputs, or a part of them.
        n: the number of examples in the inputs that x is a part of.
    """
    if isinstance(x, StructuredInputs):
        return _of_parts("arguments", list(x.arguments), len(x))
    if isinstance(x, Tensor):
        if x.dtype.is_complex or x.is_quantized:
            return None
        holds_examples = x.ndim > 0 and len(x) == (len(x) if n is None else n)
        shape = [N_EXAMPLES, *x.shape[1:]] if holds_examples else list(x.shape)
        is_whole = not x.is_floating_point() and x.dtype is not torch.bool
        largest = max(0, int(x.max())) if is_whole and x.numel() else 0
        return {"tensor": {"shape": shape, "dtype": str(x.dtype).removeprefix("torch."), "largest": largest}}
    if type(x) in (tuple, list):
        return _of_parts(type(x).__name__, list(x), n)
    if type(x) is dict and all(isinstance(key, str) for key in x):
        parts = {key: _recipe(part, n) for key, part in x.items()}
        return None if None in parts.values() else {"dict": parts}
    return {"value": x} if x is None or type(x) in (bool, int, float, str) else None


def _of_parts(kind: str, parts: list[Any], n: int | None) -> Recipe | None:
    recipes = [_recipe(part, n) for part in parts]
    return None if None in recipes else {kind: recipes}


def _made(recipe: Recipe, device: torch.device, generator: torch.Generator) -> Any:
    """What a recipe says, the same on every device."""
    ((kind, of),) = recipe.items()
    if kind == "value":
        return of
    if kind == "tensor":
        return _tensor(of["shape"], getattr(torch, of["dtype"]), of["largest"], generator).to(device)
    if kind == "dict":
        return {key: _made(part, device, generator) for key, part in of.items()}
    parts = [_made(part, device, generator) for part in of]
    if kind == "arguments":
        return StructuredInputs(tuple(parts), N_EXAMPLES, device)
    return tuple(parts) if kind == "tuple" else parts


def _tensor(shape: list[int], dtype: torch.dtype, largest: int, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    # counted from one, so that no example of a mask is zero throughout
    numbers = torch.arange(1, math.prod(shape) + 1).reshape(shape)
    return numbers % 2 == 1 if dtype is torch.bool else (numbers % (largest + 1)).to(dtype)


def _outputs(model: nn.Module, recipe: Recipe) -> tuple[Float[Tensor, " K"], float]:
    """Entries of the outputs on the batch of a recipe, and their machine precision."""
    device = next(model.parameters()).device
    x = _made(recipe, device, torch.Generator().manual_seed(0))
    full = _float32_in_full() if device.type == "cuda" else nullcontext()
    with evaluation_mode(model), torch.autocast(device.type, enabled=False), full:
        f = call_model(model, x)
    return some_entries(f.detach()).double().cpu(), precision(f, model.parameters())


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Compute products of float32 in full precision on every device."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # pyright: ignore[reportAttributeAccessIssue]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


_float32_in_full = SharedSetting(_without_tf32)


def _check_recipe(recipe: Any) -> None:
    """Raise `FileFormatError` unless this is a `Recipe`."""
    if not isinstance(recipe, Mapping) or len(recipe) != 1:
        raise FileFormatError("the saved state is damaged: the recipe of the fixed batch is none.")
    ((kind, of),) = recipe.items()
    if kind == "value" and (of is None or isinstance(of, (bool, int, float, str))):
        return
    if kind == "tensor":
        shape, name = saved.entry(of, "shape", list, tuple), saved.entry(of, "dtype", str)
        saved.whole_number(of, "largest", 0)
        if (
            saved.is_shape(shape)
            and math.prod(shape) <= _LARGEST
            and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return
    elif (kind == "dict" and isinstance(of, Mapping)) or (kind in _SEQUENCES and isinstance(of, (list, tuple))):
        for part in of.values() if isinstance(of, Mapping) else of:
            _check_recipe(part)
        return
    raise FileFormatError(f"the saved state is damaged: the recipe of the fixed batch holds {kind!r} that is none.")
