"""The optimisers of the study by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from laplace_ws.optim import KFAC

Make = Callable[..., "list[torch.optim.Optimizer]"]


def _nadamw(model: nn.Module, **options: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.NAdam(model.parameters(), decoupled_weight_decay=True, **options)]


def _adamw(model: nn.Module, **options: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), **options)]


def _sgd(model: nn.Module, **options: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **options)]


def _muon(model: nn.Module, lr: float, weight_decay: float, **options: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of hidden layers; AdamW, at the same rate, for all else [Jordan et al. 2024]."""
    if not hasattr(torch.optim, "Muon"):
        sys.exit(
            f"error: torch {torch.__version__} has no torch.optim.Muon; install torch 2.9 or newer, or leave muon out"
        )
    named = list(model.named_parameters())
    hidden = [p for name, p in named if p.ndim == 2 and not name.startswith("head")]
    others = [p for p in model.parameters() if not any(p is other for other in hidden)]
    muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw", **options)
    return [muon, torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay)]


def _soap(model: nn.Module, **options: Any) -> list[torch.optim.Optimizer]:
    try:
        from pytorch_optimizer import SOAP
    except ImportError:
        sys.exit("error: SOAP is in the package pytorch_optimizer; pip install '.[experiments]', or leave soap out")
    return [SOAP(model.parameters(), **options)]


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
