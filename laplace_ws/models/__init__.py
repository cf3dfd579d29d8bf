"""Networks whose parameters all have a curvature block."""

from __future__ import annotations

from laplace_ws.models.build import MODEL_NAMES, build_model
from laplace_ws.models.lenet import LeNet
from laplace_ws.models.mlp import MLP
from laplace_ws.models.scalars import Bias, Scale
from laplace_ws.models.wide_resnet import Norm, WideResNet

__all__ = ["MLP", "MODEL_NAMES", "Bias", "LeNet", "Norm", "Scale", "WideResNet", "build_model"]
