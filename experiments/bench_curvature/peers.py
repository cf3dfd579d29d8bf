"""The curvature of a batch by other libraries, used as their documentation has it; each is imported by the function that needs it.

A case that a library has no notion of raises `NotOffered` with the reason; anything else that is raised is the library's own error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench_curvature.setting import NotOffered, Setting, Work
from laplace_ws.models import WideResNet


def curvlinops(setting: Setting) -> Work:
    """`KFACLinearOperator`: every call adds the batch to the operator's factors, and returns them."""
    from curvlinops import KFACLinearOperator

    operator = KFACLinearOperator(
        setting.model,
        nn.CrossEntropyLoss(reduction="sum"),
        list(setting.model.parameters()),
        [(setting.x, setting.y)],
        check_deterministic=False,
        fisher_type=_own_name(setting, "curvlinops", {"ggn": "type-2", "ggn_mc": "mc", "ef": "empirical"}),
        kfac_approx=setting.kfac_approx,
    )

    def add() -> list[Tensor]:
        operator.compute_kronecker_factors()
        return [*operator._input_covariances.values(), *operator._gradient_covariances.values()]

    return add


def laplace_torch(backend: str) -> Callable[[Setting], Work]:
    """The body of the loop of `KronLaplace.fit` with "Curvlinops", "Asdl" or "BackPack"."""
    calls = {"ggn": ("GGN", {"stochastic": False}), "ggn_mc": ("GGN", {"stochastic": True}), "ef": ("EF", {})}

    def prepare(setting: Setting) -> Work:
        from laplace import curvature
        from laplace.utils import Kron

        if backend == "BackPack" and setting.kfac_approx == "reduce":
            raise NotOffered(_ONE_APPROXIMATION)
        model, x, y = setting.model, setting.x, setting.y
        flavour, options = _own_name(setting, "laplace-torch", calls)
        of_batch = getattr(curvature, f"{backend}{flavour}")(model, "classification", **options)
        chosen = {"kfac_approx": "reduce"} if setting.kfac_approx == "reduce" else {}  # expand is the default
        total: dict[str, Any] = {"loss": 0.0, "H": Kron.init_from_model(list(model.parameters()), x.device, x.dtype)}

        def add() -> None:
            model.zero_grad()
            loss, H = of_batch.kron(x, y, N=len(x), **chosen)
            total["loss"] += loss
            total["H"] += H

        return add

    return prepare


def asdl(setting: Setting) -> Work:
    """A `FisherMaker` of Kronecker shape that accumulates; every call returns the factors."""
    from asdl import FISHER_EMP, FISHER_EXACT, FISHER_MC, LOSS_CROSS_ENTROPY, SHAPE_KRON, FisherConfig, get_fisher_maker

    if setting.kfac_approx == "reduce":
        raise NotOffered("ASDL has K-FAC-expand alone")
    model, x, y = setting.model, setting.x, setting.y
    kind = _own_name(setting, "ASDL", {"ggn": FISHER_EXACT, "ggn_mc": FISHER_MC, "ef": FISHER_EMP})
    maker = get_fisher_maker(model, FisherConfig(kind, [SHAPE_KRON], LOSS_CROSS_ENTROPY, data_size=1))
    loss = nn.CrossEntropyLoss(reduction="sum")

    def add() -> list[Tensor]:
        outputs = maker.setup_model_call(model, x)
        maker.setup_loss_call(loss, outputs, y)
        maker.forward_and_backward(accumulate=True)
        factors = [maker.get_fisher_tensor(module, "kron", side) for module in model.modules() for side in "AB"]
        return [factor for factor in factors if factor is not None]

    return add


def backpack(setting: Setting) -> Work:
    """The extension KFLR (exact) or KFAC (one sample)."""
    from backpack.extensions import KFAC, KFLR

    return _backpack(setting, _own_name(setting, "BackPACK's K-FAC", {"ggn": KFLR, "ggn_mc": KFAC}))


def backpack_kfra(setting: Setting) -> Work:
    """The extension KFRA, for the exact GGN alone."""
    from backpack.extensions import KFRA

    return _backpack(setting, _own_name(setting, "BackPACK's KFRA", {"ggn": KFRA}))


def _own_name(setting: Setting, library: str, names: Mapping[str, Any]) -> Any:
    """What a library calls the setting's curvature."""
    if setting.curvature not in names:
        raise NotOffered(f"{library} has no {setting.curvature}")
    return names[setting.curvature]


_ONE_APPROXIMATION = "BackPACK has one approximation for convolutions; it is listed with expand"


def _backpack(setting: Setting, extension: Callable[[], Any]) -> Work:
    from backpack import backpack, extend

    if setting.kfac_approx == "reduce":
        raise NotOffered(_ONE_APPROXIMATION)
    x, y = setting.x, setting.y
    model = extend(with_plain_pooling(setting), use_converter=True)
    loss = extend(nn.CrossEntropyLoss())

    def compute() -> None:
        model.zero_grad()
        with backpack(extension()):
            loss(model(x), y).backward()

    return compute


def with_plain_pooling(setting: Setting) -> WideResNet:
    """The network with `AvgPool2d` over all positions in place of `AdaptiveAvgPool2d(1)`, which BackPACK's K-FAC does not know."""
    model = setting.model
    with torch.no_grad():
        sides = model.pre_pool(model.blocks(model.stem(setting.x[:1]))).shape[-2:]
    model.pool = nn.Sequential(nn.AvgPool2d(tuple(sides)), nn.Flatten())
    return model
