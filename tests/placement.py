"""Puts what tests make on a device: the tests stay as they are, and the library gets no help.

Inside `placed(device)` a tensor that a test makes without naming a device, `torch.randn(4, 3)`, is on that device; so are the
parameters of the models that it builds and the generators that it makes. What the package itself makes without a device stays on
the CPU, where it meets the tensors of the test with an error, as it would for a user: who makes a tensor is seen from the stack of
calls. Numbers are drawn on the CPU and moved, so that a test sees the same on every device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import second_device
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import laplace_ws

TESTS = Path(__file__).parent
PACKAGE = Path(laplace_ws.__file__).parent
TORCH = Path(torch.__file__).parent

MAKERS = {
    torch.arange, torch.as_tensor, torch.asarray, torch.empty, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones,
    torch.rand, torch.randint, torch.randn, torch.randperm, torch.scalar_tensor, torch.tensor, torch.tril_indices,
    torch.triu_indices, torch.zeros,
}  # fmt: skip
DRAWS_LIKE = {torch.rand_like, torch.randint_like, torch.randn_like}
DRAWS_IN_PLACE = {Tensor.bernoulli_, Tensor.exponential_, Tensor.normal_, Tensor.random_, Tensor.uniform_} | {
    function for name, function in vars(torch.nn.init).items() if name.endswith("_") and not name.startswith("_")
}


@contextmanager
def placed(device: torch.device | str) -> Iterator[None]:
    """What tests make inside is on `device`."""
    original = torch.Generator

    where = device

    def generator(device: Any = None) -> torch.Generator:
        return original(device if device is not None else where if _is_made_by_a_test() else "cpu")

    torch.Generator = second_device.replaced(original, generator)
    try:
        with _Placement(torch.device(device)):
            yield
    finally:
        torch.Generator = original


class _Placement(TorchFunctionMode):
    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKERS and kwargs.get("device") is None:
            if _is_made_by_a_test(func):
                return self._make(func, args, kwargs)
            if isinstance(kwargs.get("generator"), second_device.SecondGenerator):  # torch itself sees one of the CPU
                raise RuntimeError(f"Expected a 'cpu' device type for generator but found '{second_device.NAME}'")
        if func in DRAWS_LIKE and kwargs.get("device") is None and _is_made_by_a_test(func):
            return func(args[0].detach().cpu(), *args[1:], **kwargs).to(args[0].device)
        if func in DRAWS_IN_PLACE and _is_made_by_a_test(func):
            return _draw_in_place(func, args, kwargs)
        return func(*args, **kwargs)

    def _make(self, func: Callable, args: Any, kwargs: dict[str, Any]) -> Tensor:
        requires_grad = kwargs.pop("requires_grad", False)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cuda":  # draws there, where nothing else could
            return func(*args, **kwargs, device=generator.device, requires_grad=requires_grad)
        made = func(*args, **kwargs).to(self.device)
        return made.requires_grad_() if requires_grad else made


def _draw_in_place(func: Callable, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Fill a tensor with numbers drawn on the CPU."""
    tensor = args[0] if args else kwargs.pop("tensor")
    drawn = func(tensor.detach().cpu(), *args[1:], **kwargs)
    with torch.no_grad():
        return tensor.copy_(drawn)


# ------------------------------------------------------------------ who makes a tensor


def _is_made_by_a_test(func: Callable | None = None) -> bool:
    """Whether a test, or a model that it builds, is nearer on the stack than the package; other libraries work for their caller."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        makes = _makes(frame.f_code.co_filename)
        if makes is not None and not _hands_on(frame, func):
            return makes
        frame = frame.f_back
    return False


def _hands_on(frame: FrameType, func: Callable | None) -> bool:
    """Whether a frame is that of another function mode that only passes this call on."""
    return frame.f_code.co_name == "__torch_function__" and frame.f_locals.get("func") is func


@cache
def _makes(file: str) -> bool | None:
    """Whether code of a file is a test's or a model's (True), or the package's (False); None for code that works for its caller."""
    path = Path(file)
    if path.is_relative_to(TORCH / "utils" / "data"):
        return False  # loaders draw their order on the CPU
    if path in (Path(__file__), Path(second_device.__file__)) or not (
        path.is_relative_to(TESTS) or path.is_relative_to(PACKAGE)
    ):
        return None
    return not path.is_relative_to(PACKAGE) or path.is_relative_to(PACKAGE / "models")
