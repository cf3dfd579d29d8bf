"""Data of a user's own: four tensors, or an `ImageData`, checked and put on a device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laplace_ws.data.datasets import ImageData, split_off
from laplace_ws.data.sources import RawSplit
from laplace_ws.values import shown

_FORM = "(x_train, y_train, x_test, y_test), four tensors, or a laplace_ws.data.ImageData"


def as_data(name: str, made: object) -> ImageData:
    """What a user's function returned, as data to train and test on.

    Args:
        name: of the function.
        made: `(x_train, y_train, x_test, y_test)`, inputs `[N, …]` as the network gets them and classes `[N]` from 0; or `ImageData`,
            which knows the pixels of its images too.

    Raises:
        TypeError: it is neither.
        ValueError: numbers of examples, shapes or classes do not fit together.
    """
    data = made if isinstance(made, ImageData) else _of_tensors(name, made)
    for part, x, y in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
        if not len(x) or y.shape != (len(x),):
            raise ValueError(
                f"{name} must return one class for each example and at least one example, but x_{part} is {tuple(x.shape)} and y_{part} "
                f"{tuple(y.shape)}."
            )
        if y.is_floating_point() or y.is_complex():
            raise ValueError(f"{name} must return classes as whole numbers, but y_{part} is {y.dtype}; use y.long().")
        if x.is_floating_point() and not x.isfinite().all():
            raise ValueError(f"{name} must return finite inputs, but x_{part} holds NaN or infinite values.")
        if not 0 <= int(y.min()) <= int(y.max()) < data.n_classes:
            raise ValueError(
                f"{name} must return classes from 0 to {data.n_classes - 1}, but those of y_{part} span {int(y.min())} … {int(y.max())}."
            )
    if data.x_train.shape[1:] != data.x_test.shape[1:] or data.x_train.dtype != data.x_test.dtype:
        given = " and ".join(f"{tuple(x.shape[1:])} of {x.dtype}" for x in (data.x_train, data.x_test))
        raise ValueError(
            f"{name} must return inputs of one shape and type to train and to test on, but they are {given}."
        )
    return data


def _of_tensors(name: str, made: object) -> ImageData:
    if not isinstance(made, (tuple, list)) or len(made) != 4:  # pyright: ignore[reportUnknownArgumentType]
        of_length = f" of length {len(made)}" if isinstance(made, (tuple, list)) else ""  # pyright: ignore[reportUnknownArgumentType]
        what = f"a {type(made).__name__}{of_length}" if of_length else shown(made)  # pyright: ignore[reportUnknownArgumentType]
        raise TypeError(f"{name} must return {_FORM}, but it returned {what}.")
    for part, value in zip(("x_train", "y_train", "x_test", "y_test"), made, strict=True):  # pyright: ignore[reportUnknownArgumentType]
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise TypeError(
                f"{name} must return {_FORM}, but its {part} is {shown(value)}; make a tensor by torch.as_tensor(…)."
            )
    x_train, y_train, x_test, y_test = made  # pyright: ignore[reportUnknownVariableType]
    largest = max((int(y.max()) for y in (y_train, y_test) if y.numel()), default=0)
    classes = tuple(map(str, range(largest + 1)))
    return ImageData(name, x_train, y_train, x_test, y_test, classes, torch.zeros(1), torch.ones(1), has_pixels=False)


def part_of(
    data: ImageData,
    *,
    n_train: int | None = None,
    n_test: int | None = None,
    held_out: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> ImageData:
    """Class-balanced subsets of data, on a device; the arguments are those of `load_dataset`. The inputs stay as they are.

    Raises:
        ValueError: a subset larger than its split, or nothing to hold out.
    """
    train, rest = split_off(RawSplit(data.x_train, data.y_train), n_train, "n_train", seed)
    if held_out and not len(rest.y):
        raise ValueError(f"held_out needs n_train below {len(data.y_train)}, the size of the training split")
    test, _ = split_off(rest if held_out else RawSplit(data.x_test, data.y_test), n_test, "n_test", seed)
    moved: dict[str, Any] = {
        "x_train": train.x,
        "y_train": train.y.long(),
        "x_test": test.x,
        "y_test": test.y.long(),
        "mean": data.mean,
        "std": data.std,
    }
    return replace(data, **{part: value.to(device) for part, value in moved.items()})
