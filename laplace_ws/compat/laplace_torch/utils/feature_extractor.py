"""A network, its last layer, and what that is given."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import ExitStack
from enum import Enum
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["FeatureExtractor", "FeatureReduction"]


class FeatureReduction(str, Enum):
    """How features of several positions become one vector an example."""

    PICK_FIRST = "pick_first"
    PICK_LAST = "pick_last"
    AVERAGE = "average"


class FeatureExtractor(nn.Module):
    """Runs a network and keeps the input of its last layer, which must be linear.

    Args:
        model: the network.
        last_layer_name: of its last layer; found in the first forward pass where not given: the layer that is done last.
        enable_backprop: keep the graph of the features.
        feature_reduction: of features with more axes than two. The curvature here does not need it: a gradient reaches the positions
            that the model reads, and no others.
    """

    last_layer: nn.Module | None

    def __init__(
        self,
        model: nn.Module,
        last_layer_name: str | None = None,
        enable_backprop: bool = False,
        feature_reduction: FeatureReduction | str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.enable_backprop = enable_backprop
        self.feature_reduction: FeatureReduction | None = (
            None if feature_reduction is None else FeatureReduction(feature_reduction)
        )
        self.last_layer = None
        self._last_layer_name: str | None = None
        self._features: Tensor | None = None
        if last_layer_name is not None:
            self.set_last_layer(last_layer_name)

    def forward(self, x: Tensor | MutableMapping[str, Any]) -> Tensor:
        """The outputs of the network."""
        return self.find_last_layer(x) if self.last_layer is None else self.model(x)

    def forward_with_features(self, x: Tensor | MutableMapping[str, Any]) -> tuple[Tensor, Float[Tensor, "N ... D"]]:
        """The outputs, and the inputs of the last layer, reduced."""
        f = self.forward(x)
        features = self._features
        assert features is not None
        if features.ndim > 2 and self.feature_reduction is not None:
            positions = features.flatten(1, -2)
            if self.feature_reduction is FeatureReduction.AVERAGE:
                features = positions.mean(1)
            else:
                features = positions[:, 0 if self.feature_reduction is FeatureReduction.PICK_FIRST else -1]
        return f, features

    def set_last_layer(self, last_layer_name: str) -> None:
        """Name the last layer.

        Raises:
            KeyError: there is no such module.
            ValueError: it is not linear.
        """
        layer = dict(self.model.named_modules())[last_layer_name]
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"the last layer, {last_layer_name!r}, is a {type(layer).__name__} and must be nn.Linear; name another by last_layer_name."
            )
        self._last_layer_name, self.last_layer = last_layer_name, layer
        layer.register_forward_hook(self._keep)

    def find_last_layer(self, x: Tensor | MutableMapping[str, Any]) -> Tensor:
        """Run the network, take the layer that is done last as its last one, and return the outputs.

        Raises:
            ValueError: the last layer is known already, is not linear, or is the only one.
        """
        if self.last_layer is not None:
            raise ValueError(f"the last layer is known: {self._last_layer_name!r}.")
        leaves = [(name, module) for name, module in self.model.named_modules() if not list(module.children())]
        if len(list(self.model.modules())) <= 2:
            raise ValueError("the model has one module, so all of it is the last layer; take subset_of_weights='all'.")
        done: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name, module in leaves:
                hooks.enter_context(module.register_forward_hook(partial(_note, done, name)))
            f = self.model(x)
        name = list(done)[-1]
        self.set_last_layer(name)
        self._features = done[name] if self.enable_backprop else done[name].detach()
        return f

    def _keep(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self._features = arguments[0] if self.enable_backprop else arguments[0].detach()


def _note(done: dict[str, Any], name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
    done.pop(name, None)  # called again, it is done later
    done[name] = arguments[0] if arguments else None
