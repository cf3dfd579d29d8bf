"""Calls on tensors whose examples lie along another axis than the first, as in recurrent networks and transformers with the time first.

Where the first axis cannot be that of the examples, and one other can, a call is made with this one first. Where the first could be, as
the time is a multiple of the batch, a check on single examples shows that it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from laplace_ws.curvature.calls import MOVABLE


class RowsElsewhere(Exception):
    """A check has found parameters whose calls have the examples along another axis than the first; to be repeated."""


class OtherBatchAxisError(Exception):
    """A call has the examples along another axis.

    Attributes:
        axis: which.
    """

    def __init__(self, axis: int) -> None:
        super().__init__(axis)
        self.axis = axis


def with_batch_first(function: Callable[..., Any], axis: int, *args: Any, **kwargs: Any) -> Tensor:
    """The same call with the examples first, whose output is put back; a call of `MOVABLE`.

    Args:
        function: the call.
        axis: that of the examples.
        *args: its arguments.
        **kwargs: others.
    """
    if MOVABLE[function](args):
        return function(args[0].movedim(axis, 0), *args[1:], **kwargs).movedim(0, axis)
    ndim = max(t.ndim for t in args if isinstance(t, Tensor))
    return function(*(_moved(t, axis, ndim) for t in args), **kwargs).movedim(0, axis)


def _moved(value: Any, axis: int, ndim: int) -> Any:
    """An argument that is broadcast to `ndim` axes, with one of these first."""
    if not isinstance(value, Tensor) or value.ndim < ndim - axis:
        return value
    return value[(None,) * (ndim - value.ndim)].movedim(axis, 0)
