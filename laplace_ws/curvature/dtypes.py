"""What torch's errors about types mean, in terms of a model and its inputs."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_OF_TYPES = re.compile(r"dtype|datatype|scalar type|Input type|Type promoting|not implemented for '")
_NAMES = {
    torch.uint8: ("Byte", "unsigned char"),
    torch.int8: ("Char", "signed char"),
    torch.int16: ("Short", "short"),
    torch.int32: ("Int", "int"),
    torch.int64: ("Long", "long"),
    torch.bool: ("Bool", "bool"),
    torch.complex64: ("ComplexFloat", "complex<float>"),
    torch.complex128: ("ComplexDouble", "complex<double>"),
}
"""What torch's errors call types that are not floating point."""


def type_mismatch(model: nn.Module, inputs: Iterable[object], error: str) -> str | None:
    """A sentence in place of torch's, naming the types that do not go together and the mend; None for an error about something else.

    Args:
        model: the network.
        inputs: what it was called with.
        error: torch's message.
    """
    if not _OF_TYPES.search(error):
        return None
    given = list(dict.fromkeys(x.dtype for x in inputs if isinstance(x, Tensor)))
    own = list(dict.fromkeys(p.dtype for p in model.parameters() if p.is_floating_point()))
    if "'indices'" in error:
        other = next((dtype for dtype in given if dtype not in (torch.int64, torch.int32)), None)
        if other is not None:
            return (
                f"the inputs are {other}, but the model looks them up in an embedding, which takes torch.int64; convert them, for "
                "example by x.long()."
            )
    elif own and (other := next((dtype for dtype in given if _is_meant(model, dtype, own, error)), None)):
        what = "one of them" if other.is_floating_point else "the inputs"
        return f"the inputs are {other} and the model's parameters {own[0]}; convert {what}, for example by x.to({own[0]})."
    if len(own) > 1:
        listed = " and ".join(map(str, own))
        return (
            f"the parameters of {type(model).__name__} are {listed}, which its forward pass does not bring together; convert them to "
            f"one type, for example by model.to({own[0]})."
        )
    text = " ".join(error.split()).split(". ")[0].rstrip(".")
    return f"types that do not go together meet in the forward pass of {type(model).__name__} ({text}); convert one of them there."


def _is_meant(model: nn.Module, dtype: torch.dtype, own: list[torch.dtype], error: str) -> bool:
    """Whether inputs of a type are at fault: floating point of another type, or what is no floating point and no index."""
    if dtype.is_floating_point:
        return dtype not in own
    is_named = any(re.search(rf"\b{re.escape(name)}", error) for name in _NAMES.get(dtype, ()))
    return is_named or not any(isinstance(module, nn.Embedding) for module in model.modules())
