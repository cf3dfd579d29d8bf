"""Laplace approximations and marginal likelihoods for PyTorch networks with weight sharing."""

import lazy_loader  # pyright: ignore[reportMissingTypeStubs]

# What the package offers is stated once, in `__init__.pyi`; torch is imported when something of it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # pyright: ignore[reportUnknownVariableType]
