"""Networks and data of a user's own on the command line: functions that are named as "package.module:function"."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laplace_ws.curvature.backend import evaluation_mode
from laplace_ws.curvature.inputs import call_model
from laplace_ws.data import ImageData, as_data
from laplace_ws.registry import unknown_name
from laplace_ws.values import shown


def own_model(name: str, data: ImageData, options: Mapping[str, Any]) -> nn.Module:
    """The network that a user's function makes, called as `make(input_shape=(1, 28, 28), n_classes=10, **options)`.

    Args:
        name: of the function, "package.module:function".
        data: whose inputs `[N, *input_shape]` the network takes, to give logits `[N, n_classes]`.
        options: further options of the model that were given.

    Raises:
        ValueError: there is no such function, it does not take what it is given, or it returns no network.
    """
    given = {"input_shape": tuple(data.x_train.shape[1:]), "n_classes": data.n_classes, **options}
    made = _called("model.factory", name, (), given, f"set {' '.join(f'--model.{o} null' for o in options)}")
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"model.factory={name} must return a network, a torch.nn.Module, but it returned {shown(made)}."
        )
    device = next((p.device for p in made.parameters()), torch.device("cpu"))
    x = data.x_train[:2].to(device)
    with evaluation_mode(made), torch.no_grad():
        f = call_model(made, x)
    if f.shape != (len(x), data.n_classes):
        raise ValueError(
            f"model.factory={name} must return a network that maps {list(x.shape)} to [{len(x)}, {data.n_classes}], one logit for each of "
            f"the {data.n_classes} classes, but its outputs are {list(f.shape)}."
        )
    return made


def own_data(name: str, root: Path) -> ImageData:
    """The data that a user's function returns, called as `make(root)`; see `laplace_ws.data.as_data` for what that may be.

    Args:
        name: of the function, "package.module:function".
        root: folder of the data, which the function may leave alone.

    Raises:
        ValueError: there is no such function, it does not take what it is given, or what it returns does not fit together.
    """
    made = _called("data.factory", name, (root,), {})
    try:
        data = as_data(f"data.factory={name}", made)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return data if isinstance(made, ImageData) else replace(data, name=name)


def _called(option: str, name: str, args: tuple[Any, ...], given: Mapping[str, Any], leave_out: str = "") -> Any:
    function = named_function(option, name)
    try:
        inspect.signature(function).bind(*args, **given)
    except TypeError as error:
        call = ", ".join([*(repr(str(arg)) for arg in args), *(f"{key}={value!r}" for key, value in given.items())])
        mend = f", or {leave_out}" if set(given) - {"input_shape", "n_classes"} else ""
        raise ValueError(
            f"{option}={name} is called as {name.partition(':')[2]}({call}), but {error}; let it take these{mend}."
        ) from None
    return function(*args, **given)


def named_function(option: str, name: str) -> Callable[..., Any]:
    """The function of a name such as "package.module:function"; modules are looked for in the current folder too.

    Args:
        option: that gave the name, for messages.
        name: of the function.

    Raises:
        ValueError: the name has another form, or there is no such module or function.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path or not all(part.isidentifier() for part in f"{module_name}.{path}".split(".")):
        raise ValueError(f"{option}={name!r} must name a function as package.module:function, such as mynets:make.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{option}={name}: {module_name!r} cannot be imported, as it imports {error.name!r}, which is not installed; install that."
            ) from error
        raise ValueError(
            f"{option}={name}: there is no module {module_name!r}, neither installed nor in the current folder; name one that can "
            "be imported."
        ) from None
    for part in path.split("."):
        if not hasattr(found, part):
            public = [known for known, value in vars(found).items() if callable(value) and not known.startswith("_")]
            raise ValueError(f"{option}={name}: {unknown_name(f'function of {module_name}', part, public)}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{option}={name} must name a function, but it is {shown(found)}.")
    return found
