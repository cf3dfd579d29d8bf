"""Our own curvature of a batch, as a fit over many batches pays for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from bench_curvature.setting import Setting, Work
from laplace_ws.curvature import Curvature, CurvatureSum, make_backend
from laplace_ws.kfac import FactorPrecision, KronAccumulator, approximation_by_parameter
from laplace_ws.likelihoods import Categorical


def preparer(backend: str) -> Callable[[Setting], Work]:
    """What prepares one of our backends."""
    return partial(prepare, backend=backend)


def prepare(
    setting: Setting, *, backend: str = "native", factor_precision: str = FactorPrecision.FLOAT32.value
) -> Work:
    """Adds the batch to sums of Kronecker factors; the first call checks the model, and pays what a backend does once for it."""

    def make_accumulator(parameters: Mapping[str, nn.Parameter]) -> KronAccumulator:
        approximations = approximation_by_parameter(setting.kfac_approx, list(parameters))
        return KronAccumulator(parameters, approximations, factor_precision)

    total = CurvatureSum(
        setting.model,
        Categorical(),
        make_accumulator,
        curvature=Curvature(setting.curvature),
        backend=make_backend(backend),
    )
    return partial(total.add, setting.x, setting.y)
