"""Dropout as an option of a network: no layer at all where it is 0."""

from __future__ import annotations

from torch import nn

from laplace_ws.values import real_number


def dropout_layers(dropout: float) -> list[nn.Module]:
    """A dropout layer, or none for 0, so that a network without dropout has no trace of it.

    Args:
        dropout: share of the activations that are dropped in train mode; the others are scaled up [Srivastava et al. 2014].

    Raises:
        ValueError: it is below 0, or 1 and above.
    """
    dropout = real_number("dropout", dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout:g} must be at least 0 and below 1")
    return [nn.Dropout(dropout)] if dropout else []
