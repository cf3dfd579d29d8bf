"""The optimisers of the study by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from laplace_ws.optim import KFAC

Make = Callable[..., "list[torch.optim.Optimizer]"]


def _nadamw(model: nn.Module, **options: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.NAdam(model.parameters(), decoupled_weight_decay=True, **options)]


def _adamw(model: nn.Module, **options: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), **options)]


def _sgd(model: nn.Module, **options: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **options)]


def _muon(model: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and convolutions of hidden layers; AdamW, at the same rate, for all else [Jordan et al. 2024]."""
    package = _pytorch_optimizer("Muon")
    matrix = importlib.import_module("pytorch_optimizer.optimizer.utils.matrix")

    class Float32Muon(package.Muon):
        """With its products in float32, as those in bfloat16 take 15 times as long on a CPU that has none."""

        @staticmethod
        def _orthogonalize(group: Mapping[str, Any], updates: list[Tensor]) -> list[Tensor]:
            options = {"num_steps": group["ns_steps"], "weights": group["ns_coeffs"], "dtype": torch.float32}
            matrices = [update.reshape(len(update), -1) for update in updates]
            return [matrix.zero_power_via_newton_schulz_5(update, **options) for update in matrices]

    named = list(model.named_parameters())
    convolutions = [p for _, p in named if p.ndim == 4][1:]  # the first one sees the images
    hidden = [p for name, p in named if p.ndim == 2 and not name.startswith(("head", "classifier"))] + convolutions
    others = [p for p in model.parameters() if not any(p is other for other in hidden)]
    is_cpu = hidden[0].device.type == "cpu"
    shared = {"lr": lr, "weight_decay": weight_decay}
    groups = [
        {"params": hidden, "use_muon": True, "use_adjusted_lr": True, **shared},
        {"params": others, "use_muon": False, "betas": (0.9, 0.999), "eps": 1e-8, **shared},
    ]
    return [(Float32Muon if is_cpu else package.Muon)(groups)]


def _soap(model: nn.Module, **options: Any) -> list[torch.optim.Optimizer]:
    return [_pytorch_optimizer("SOAP").SOAP(model.parameters(), **options)]


def _pytorch_optimizer(wanted: str) -> ModuleType:
    try:
        return importlib.import_module("pytorch_optimizer")
    except ImportError:
        sys.exit(
            f"error: {wanted} is in the package pytorch_optimizer; pip install '.[experiments]', or leave {wanted.lower()} out"
        )


def _kfac(model: nn.Module, **options: Any) -> list[torch.optim.Optimizer]:
    return [KFAC(model, **options)]


_OPTIMIZERS: Mapping[str, Make] = {
    "nadamw": _nadamw,
    "adamw": _adamw,
    "sgd": _sgd,
    "muon": _muon,
    "soap": _soap,
    "kfac": _kfac,
}


def make_optimizers(name: str, model: nn.Module, options: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    """The optimisers that train a network together, each on parameters of its own."""
    if name not in _OPTIMIZERS:
        sys.exit(f"error: unknown optimizer {name!r}: choose one of {', '.join(map(repr, _OPTIMIZERS))}")
    return _OPTIMIZERS[name](model, **options)
