"""Patches against torch's own convolution, and the fast patch sum against the patches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laplace_ws.kfac.conv import ConvGeometry, n_positions, patch_sum, patches

CONVS = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}


@st.composite
def convolutions(draw):
    dim = draw(st.integers(1, 3))
    ints = lambda low, high: st.integers(low, high)  # noqa: E731
    groups = draw(st.sampled_from([1, 2]))
    kernel = tuple(draw(ints(1, 3)) for _ in range(dim))
    dilation = tuple(draw(ints(1, 2)) for _ in range(dim))
    size = tuple(draw(ints(d * (k - 1) + 1, d * (k - 1) + 3)) for k, d in zip(kernel, dilation, strict=True))
    padding = draw(st.sampled_from(["same", "valid", tuple(draw(ints(0, 2)) for _ in range(dim))]))
    stride = (1,) * dim if padding == "same" else tuple(draw(ints(1, 3)) for _ in range(dim))
    return dim, groups, kernel, dilation, size, padding, stride


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(deadline=None, max_examples=60, derandomize=True)
@given(convolutions())
def test_patches_reproduce_the_convolution(case):
    dim, groups, kernel, dilation, size, padding, stride = case
    x = torch.randn(2, 2 * groups, *size, dtype=torch.float64)
    weight = torch.randn(3 * groups, 2, *kernel, dtype=torch.float64)
    geometry = ConvGeometry.from_call(weight, stride, padding, dilation, groups)
    a = patches(x, geometry)
    a_by_group = a[None] if groups == 1 else a
    y = torch.einsum("gnri,goi->ngor", a_by_group, weight.reshape(groups, 3, -1)).flatten(1, 2)
    expected = CONVS[dim](x, weight, None, stride, padding, dilation, groups)
    torch.testing.assert_close(y.reshape(expected.shape), expected)
    assert a.shape[-2] == n_positions(geometry, size)
    torch.testing.assert_close(patch_sum(x, geometry), a.sum(-2))
