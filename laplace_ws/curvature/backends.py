"""The backends by name; `register_backend` adds another one."""

from __future__ import annotations

from collections.abc import Callable

from laplace_ws.curvature.autograd import AutogradBackend
from laplace_ws.curvature.backend import Backend
from laplace_ws.curvature.native import NativeBackend
from laplace_ws.registry import Registry


def _asdl() -> Backend:
    from laplace_ws.curvature.asdl import AsdlBackend

    return AsdlBackend()


def _backpack() -> Backend:
    from laplace_ws.curvature.backpack import BackpackBackend

    return BackpackBackend()


BACKENDS: Registry[Callable[[], Backend]] = Registry(
    "backend",
    {"native": NativeBackend, "asdl": _asdl, "backpack": _backpack, "autograd": AutogradBackend},
    ", or pass an instance of a `Backend`",
)
"""Makers of the backends by name; a library is imported only when its backend is made."""

FACTOR_BACKENDS = ("native", "asdl", "backpack")
"""Those of ours that give Kronecker factors."""


def register_backend(name: str, make: Callable[[], Backend]) -> None:
    """Make `backend=name` refer to a backend of your own.

    Args:
        name: its name, which is also its `Backend.name` and is stored in the files of a posterior.
        make: creates the backend; its class, for example.

    Raises:
        TypeError: the name is no string, or `make` cannot be called.
        ValueError: another backend has the name.
    """
    if not callable(make):
        raise TypeError(f"register_backend takes what makes the backend, such as its class, got {make!r}.")
    BACKENDS.register(name, make)


def make_backend(backend: str | Backend) -> Backend:
    """Turn a name into its backend; a `Backend` passes through."""
    if isinstance(backend, Backend):
        return backend
    made = BACKENDS[backend]()
    if not isinstance(made, Backend):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"what is registered as backend {backend!r} must make a Backend, but it made {made!r}.")
    return made
