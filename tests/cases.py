"""The table of models that drives the tests: deep linear ones, for which K-FAC is exact, and ones as people write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import nets
import torch
from torch import Tensor, nn

from laplace_ws.data import GraphBatch
from laplace_ws.models import WideResNet

N = 5  # examples: prime, so that no other axis is taken for the batch by accident


def double(model: nn.Module, noise: float = 0.3) -> nn.Module:
    """The model in float64, with every parameter away from zero (nets.Fixup starts with zeros, norms with ones)."""
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * noise)
    return model


# ------------------------------------------------------------------ deep linear networks


class Shared(nn.Module):
    """Layers on positions, then the two settings: positions averaged (`reduce`) or each a loss term (`expand`)."""

    def __init__(self, setting: str, layers: list[nn.Module], channels_first: bool = False):
        super().__init__()
        self.setting, self.channels_first = setting, channels_first
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        y = y.flatten(2).transpose(1, 2) if self.channels_first else y.flatten(1, -2)  # [N, R, C]
        return y.mean(1) if self.setting == "reduce" else y


class CalledTwice(nn.Module):
    """One module on two inputs side by side: its uses are further sharing positions."""

    def __init__(self, setting: str):
        super().__init__()
        self.setting = setting
        self.shared, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([self.head(self.shared(x[:, 0])), self.head(self.shared(x[:, 1]))], 1)
        return y.sum(1) if self.setting == "reduce" else y


class TiedWeights(nn.Module):
    """One weight registered in two layers."""

    def __init__(self, setting: str):
        super().__init__()
        self.setting = setting
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x[:, :2]), self.right(x[:, 2:])
        y = torch.cat([left, right], 1)
        return y.sum(1) if self.setting == "reduce" else y


class MatmulNet(nn.Module):
    """Weights on the right of a matrix product, plain and transposed."""

    def __init__(self, setting: str):
        super().__init__()
        self.setting = setting
        self.V, self.W = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.V @ self.W.t()
        return y.mean(1) if self.setting == "reduce" else y


@dataclass(frozen=True)
class LinearCase:
    """A deep linear network that is exact in either setting, but for cross terms between channel groups."""

    name: str
    make_model: Callable[[str], nn.Module]
    make_x: Callable[[], Tensor]

    def __str__(self) -> str:
        return self.name


def _conv_case(name: str, dim: int, size: tuple[int, ...], **options) -> LinearCase:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    groups = options.get("groups", 1)

    def make_model(setting: str) -> nn.Module:
        return Shared(setting, [conv(2, 2 * groups, **options), conv(2 * groups, 3, 1)], channels_first=True)

    return LinearCase(name, make_model, lambda: torch.randn(N, 2, *size, dtype=torch.float64))


LINEAR_CASES = [
    LinearCase(
        "linear",
        lambda s: Shared(s, [nn.Linear(3, 4), nn.Linear(4, 2)]),
        lambda: torch.randn(N, 6, 3, dtype=torch.float64),
    ),
    LinearCase(
        "linear-two-extra-dims",
        lambda s: Shared(s, [nn.Linear(3, 4, bias=False), nn.Linear(4, 2)]),
        lambda: torch.randn(N, 2, 3, 3, dtype=torch.float64),
    ),
    LinearCase(
        "embedding",
        lambda s: Shared(s, [nn.Embedding(7, 3), nn.Linear(3, 2)]),
        lambda: torch.randint(0, 7, (N, 4)),
    ),
    LinearCase(
        "embedding-padding",
        lambda s: Shared(s, [nn.Embedding(7, 3, padding_idx=-7), nn.Linear(3, 2)]),
        lambda: torch.randint(0, 3, (N, 4)),
    ),
    LinearCase("called-twice-linear", CalledTwice, lambda: torch.randn(N, 2, 3, dtype=torch.float64)),
    LinearCase("tied-weights-linear", TiedWeights, lambda: torch.randn(N, 5, 3, dtype=torch.float64)),
    LinearCase("matmul", MatmulNet, lambda: torch.randn(N, 4, 3, dtype=torch.float64)),
    _conv_case("conv1d", 1, (7,), kernel_size=3),
    _conv_case("conv1d-stride-padding", 1, (8,), kernel_size=3, stride=2, padding=1),
    _conv_case("conv1d-same-even-kernel", 1, (6,), kernel_size=4, padding="same"),
    _conv_case("conv1d-groups", 1, (7,), kernel_size=3, groups=2),
    _conv_case("conv2d", 2, (4, 5), kernel_size=3, padding=1),
    _conv_case("conv2d-stride-dilation", 2, (7, 8), kernel_size=(2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    _conv_case("conv2d-same-dilation", 2, (4, 4), kernel_size=3, padding="same", dilation=2),
    _conv_case("conv2d-valid", 2, (4, 4), kernel_size=2, padding="valid"),
    _conv_case("conv2d-circular", 2, (4, 4), kernel_size=3, padding=1, padding_mode="circular"),
    _conv_case("conv2d-groups", 2, (4, 4), kernel_size=3, groups=2, padding=1, stride=2),
    _conv_case("conv3d-linear", 3, (3, 4, 3), kernel_size=2, padding=1, stride=(1, 2, 1)),
    _conv_case("conv3d-circular-dilation", 3, (3, 3, 3), kernel_size=2, dilation=2, padding=1, padding_mode="circular"),
]

# ------------------------------------------------------------------ networks as people write them


@dataclass(frozen=True)
class Case:
    """A nonlinear model, a batch and a likelihood."""

    name: str
    make_model: Callable[[], nn.Module]
    make_x: Callable[[], Tensor | GraphBatch]
    likelihood: str = "classification"
    target_shape: tuple[int, ...] = (N,)
    noise: float = 0.3

    def make(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Model in float64 (statistics of normalisations set), inputs and targets."""
        model, x = double(self.make_model(), self.noise), self.make_x()
        model.train()
        with torch.no_grad():
            model(x)
        if self.likelihood == "classification":
            y = torch.randint(0, 2, self.target_shape)
        elif self.likelihood == "binary":
            y = torch.randint(0, 2, self.target_shape).double()
        else:
            y = torch.randn(self.target_shape, dtype=torch.float64)
        return model, x, y

    def __str__(self) -> str:
        return self.name


def _images() -> Tensor:
    return torch.randn(N, 2, 4, 4, dtype=torch.float64)


def _vectors() -> Tensor:
    return torch.randn(N, 3, dtype=torch.float64)


def _sequences() -> Tensor:
    return torch.randn(N, 4, 3, dtype=torch.float64)


CASES = [
    Case("mlp", lambda: nets.mlp(3), _vectors),
    Case("mlp-regression", lambda: nets.mlp(2), _vectors, "regression", (N, 2)),
    Case("mlp-one-output", lambda: nets.mlp(1), _vectors, "regression", (N, 1)),
    Case("mlp-binary", lambda: nets.mlp(1), _vectors, "binary", (N, 1)),
    Case("mlp-flat-binary", lambda: nn.Sequential(nets.mlp(1), nn.Flatten(0)), _vectors, "binary", (N,)),
    Case("mlp-tokens", nets.mlp_in_place, lambda: torch.randn(N, 2, 3, dtype=torch.float64), target_shape=(N, 2)),
    Case("fixup", nets.Fixup, _images),
    Case("inplace-batchnorm", lambda: nets.InplaceResidual(nn.BatchNorm2d), _images),
    Case("inplace-groupnorm", lambda: nets.InplaceResidual(lambda c: nn.GroupNorm(2, c, eps=0.1)), _images),
    Case(
        "grouped-conv",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)),
        _images,
    ),
    Case("functional", nets.Functional, _vectors, "regression", (N, 3)),
    Case("transformer-first-token", lambda: nets.Transformerlike(False), lambda: torch.randint(0, 6, (N, 3))),
    Case(
        "transformer-tokens",
        lambda: nets.Transformerlike(True),
        lambda: torch.randint(0, 6, (N, 3)),
        target_shape=(N, 4),
    ),
    Case("folded-time", nets.FoldedTime, lambda: torch.randn(N, 2, 3, dtype=torch.float64), "regression", (N, 2)),
    Case("tied-weights", lambda: TiedWeights("reduce"), lambda: torch.randn(N, 5, 3, dtype=torch.float64)),
    Case("cnn", nets.cnn, _images),
    Case("frozen-layers", nets.frozen_cnn, _images),
    Case("residual-blocks", nets.ResidualBlocks, _images),
    Case("scalars-and-norms", nets.scalars, _vectors),
    Case("sequence-conv1d", nets.conv1d, lambda: torch.randn(N, 2, 3, dtype=torch.float64), target_shape=(N, 3)),
    Case("conv3d", nets.conv3d, lambda: torch.randn(N, 1, 3, 4, 3, dtype=torch.float64)),
    Case("called-twice", nets.CalledTwiceNet, _vectors),
    Case("vision-transformer", nets.VisionTransformer, _images),
    Case("transformer-encoder-layer", nets.encoder, _sequences, target_shape=(N, 4)),
    Case("cross-attention", nets.CrossAttention, _sequences),
    Case("positions", lambda: nets.Positions(lambda p, i: p(i)), lambda: torch.randint(0, 6, (N, 3))),
    Case(
        "positions-as-many-as-examples",
        lambda: nets.Positions(lambda p, i: p(i[None])),
        lambda: torch.randint(0, 6, (N, N)),
    ),
    Case("adapters", lambda: nets.LowRankAdapters(False), _vectors),
    Case("adapters-bare", lambda: nets.LowRankAdapters(True), _vectors),
    Case("message-passing", nets.MessagePassing, nets.graphs),
    Case("u-net", nets.UNet, _images, target_shape=(N, 16)),
    Case("recurrent", nets.Recurrent, _sequences),
    Case("einsum-attention", nets.EinsumAttention, _sequences),
    Case("experts", nets.Experts, _sequences),
    Case("time-first", nets.TimeFirst, _sequences),
    Case("expressions", nets.Expressions, _sequences),
]

WIDE_RESNETS = [
    Case(f"wide-resnet-{norm}", partial(WideResNet, 10, 1, 2, 3, norm=norm), _images, noise=0.03)
    for norm in ("fixup", "batch", "group", "none")
]
"""Too many parameters for a dense matrix, and for much noise: a saturated softmax has no curvature."""
