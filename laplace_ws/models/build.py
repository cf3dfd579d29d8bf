"""`build_model`: a name and the shape of the data in, a network out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from laplace_ws.models.lenet import LeNet, sides
from laplace_ws.models.mlp import MLP
from laplace_ws.models.wide_resnet import WideResNet
from laplace_ws.registry import unknown_name
from laplace_ws.values import whole_number

Shape = Callable[[int, tuple[int, int], int], dict[str, Any]]
"""(channels, (height, width), classes) -> those arguments of a model that the data determine."""


def _wide_resnet_shape(in_channels: int, image_size: tuple[int, int], n_classes: int) -> dict[str, Any]:
    return {"in_channels": in_channels, "n_classes": n_classes}


def _lenet_shape(in_channels: int, image_size: tuple[int, int], n_classes: int) -> dict[str, Any]:
    return {"in_channels": in_channels, "image_size": image_size, "n_classes": n_classes}


def _mlp_shape(in_channels: int, image_size: tuple[int, int], n_classes: int) -> dict[str, Any]:
    return {"in_features": in_channels * image_size[0] * image_size[1], "out_features": n_classes}


_MODELS: dict[str, tuple[type[nn.Module], Shape]] = {
    "wide-resnet": (WideResNet, _wide_resnet_shape),
    "lenet": (LeNet, _lenet_shape),
    "mlp": (MLP, _mlp_shape),
}

_OPTIONS_OF_ANY = {name for model, _ in _MODELS.values() for name in inspect.signature(model).parameters}

MODEL_NAMES: tuple[str, ...] = tuple(_MODELS)


def build_model(
    name: str, *, in_channels: int, image_size: int | tuple[int, int], n_classes: int, **options: Any
) -> nn.Module:
    """Build a network for images of one shape.

    Args:
        name: One of `MODEL_NAMES`: "wide-resnet", "lenet", "mlp".
        in_channels: Channels of the images.
        image_size: Height and width in pixels, or one number for both.
        n_classes: Number of outputs.
        options: What else the class takes: `depth`, `width`, `norm` (wide-resnet); `hidden`, `activation` (mlp); `dropout` (all).

    Raises:
        ValueError: unknown name or option; names the nearest known one.
    """
    if not isinstance(name, str) or name not in _MODELS:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise unknown_name("model", name, MODEL_NAMES)
    model, shape = _MODELS[name]
    height, width = sides(image_size)
    in_channels, n_classes = (
        whole_number("in_channels", in_channels, least=1),
        whole_number("n_classes", n_classes, least=1),
    )
    decided = shape(in_channels, (height, width), n_classes)
    known = [option for option in inspect.signature(model).parameters if option not in decided]
    unknown = [option for option in options if option not in known]
    if unknown:
        error = unknown_name(f"option of model '{name}'", unknown[0], known, cutoff=0.0)
        if unknown[0] in _OPTIONS_OF_ANY:
            error = ValueError(
                f"{error} Leave {', '.join(unknown)} out; where a file gives {'them' if len(unknown) > 1 else 'it'}, set "
                f"{' '.join(f'--model.{option} null' for option in unknown)}."
            )
        raise error
    return model(**decided, **options)
