"""Gradients that are zero but for rounding, as that of a bias before a normalisation, pass the check in every order of the batch."""

import pytest
import torch
from torch import nn

from laplace_ws import Laplace, UnsupportedParameterError
from laplace_ws.curvature import FACTOR_BACKENDS


class Normalised(nn.Module):
    """A convolution, a normalisation over positions that takes its bias away (and its weight's size), and a mean over positions."""

    def __init__(self, affine, activation):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=affine)
        self.activation, self.head = activation, nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.activation(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.many(3)
@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU()])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_a_gradient_of_zero_is_accepted_in_every_order(scale, activation, affine, dtype, backend):
    for seed in range(6):
        torch.manual_seed(seed)
        model, x = Normalised(affine, activation).to(dtype), scale * torch.randn(8, 3, 12, 12, dtype=dtype)
        for _ in range(2):
            Laplace(model, "classification", backend=backend).check(x[torch.randperm(8)])


@pytest.mark.parametrize("share", [1.0, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hidden_part_of_a_gradient_beside_one_of_zero_is_refused(dtype, share):
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            return x + w[:, None, None]

        @staticmethod
        def backward(ctx, g):
            return g, share * g.sum((0, 2, 3))

    class Hiding(Normalised):
        def forward(self, x):
            return self.head(Hidden.apply(self.norm(self.conv(x)), self.conv.bias).relu().mean((2, 3)))

    torch.manual_seed(0)
    model = Hiding(True, nn.Identity()).to(dtype)
    with pytest.raises(UnsupportedParameterError, match=r"'conv\.bias' is used by conv2d, but not by that alone"):
        Laplace(model, "classification").check(torch.randn(8, 3, 12, 12, dtype=dtype))
