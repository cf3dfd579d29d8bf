"""The backends by name; `register_backend` adds another one."""

from __future__ import annotations

from collections.abc import Callable

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
    "backend", {"native": NativeBackend, "asdl": _asdl, "backpack": _backpack}, ", or pass an instance of a `Backend`"
)
"""Makers of the backends by name; a library is imported only when its backend is made."""


def register_backend(name: str, make: Callable[[], Backend]) -> None:
    """Make `backend=name` refer to a backend of your own.

    Args:
        name: its name, which is also its `Backend.name` and is stored in the files of a posterior.
        make: creates the backend; its class, for example.
    """
    BACKENDS.register(name, make)


def make_backend(backend: str | Backend) -> Backend:
    """Turn a name into its backend; a `Backend` passes through."""
    return backend if isinstance(backend, Backend) else BACKENDS[backend]()
