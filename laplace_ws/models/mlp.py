"""Multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from laplace_ws.models.dropout import dropout_layers
from laplace_ws.registry import unknown_name
from laplace_ws.values import shown, whole_number

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "identity": nn.Identity,
}


class MLP(nn.Sequential):
    """Linear layers with an activation between them.

    Maps `[N, ...]`, flattened to `[N, in_features]`, to `[N, out_features]`.

    Args:
        in_features: Number of inputs of one example, all dimensions together.
        hidden: Widths of the hidden layers; empty for a linear model.
        out_features: Number of outputs.
        activation: "relu", "tanh", "sigmoid", "gelu", "silu", "elu", or "identity" for a deep linear network.
        dropout: Share of the inputs of each linear layer that are dropped in train mode [Gal & Ghahramani 2016].

    Raises:
        ValueError: unknown activation, a width below one, or a dropout that is not in [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int] = (100,),
        out_features: int = 10,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        if not isinstance(activation, str) or activation not in _ACTIVATIONS:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise unknown_name("activation", activation, _ACTIVATIONS)
        if not isinstance(hidden, Sequence) or isinstance(hidden, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"hidden must be a list of widths, such as [100, 50], got {shown(hidden)}.")
        widths = [whole_number("a width", width) for width in (in_features, *hidden, out_features)]
        if min(widths) < 1:
            raise ValueError(f"all widths must be at least 1, not {widths}")
        layers: list[nn.Module] = [nn.Flatten(), *dropout_layers(dropout), nn.Linear(widths[0], widths[1])]
        for n_in, n_out in pairwise(widths[1:]):
            layers += [_ACTIVATIONS[activation](), *dropout_layers(dropout), nn.Linear(n_in, n_out)]
        super().__init__(*layers)
