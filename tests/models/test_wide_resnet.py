from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_ws.models import Bias, Norm, Scale, WideResNet
from laplace_ws.models.wide_resnet import ResidualBlock

NORMS = [norm.value for norm in Norm]


def small(norm="fixup", **options):
    torch.manual_seed(0)
    return WideResNet(**{"depth": 10, "width": 1, "in_channels": 2, "n_classes": 5, "norm": norm, **options})


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (7, 9)])
def test_maps_images_to_logits(norm, size):
    assert small(norm)(torch.randn(3, 2, *size)).shape == (3, 5)


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 2), (22, 1)])
def test_depth_counts_the_convolutions_on_the_longest_path(depth, width):
    net = small(depth=depth, width=width)
    on_path = [m for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in name]
    # The name counts the stem, the two of each block, and by habit the three shortcuts.
    assert len(on_path) + 3 == depth
    assert net.classifier.in_features == 64 * width


def test_reference_size():
    n_params = sum(p.numel() for p in WideResNet(16, 4, norm="batch").parameters())
    assert n_params == 2_748_890


@pytest.mark.parametrize(("depth", "nearest"), [(4, 10), (15, 16), (17, 16), (0, 10)])
def test_impossible_depth_names_the_nearest(depth, nearest):
    with pytest.raises(ValueError, match=rf"depth={depth} must be 6n \+ 4 .* nearest is {nearest}"):
        small(depth=depth)


def test_other_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="width=0"):
        small(width=0)
    with pytest.raises(ValueError, match="unknown norm 'bach'; did you mean 'batch'"):
        small("bach")


@pytest.mark.parametrize("norm", ["fixup", "none"])
def test_fixup_starts_at_zero_with_identity_branches(norm):
    net = small(norm, depth=16)
    assert torch.count_nonzero(net(torch.randn(3, 2, 8, 8))) == 0
    h = torch.randn(2, 16, 8, 8)
    same = [block for block in net.blocks if block.shortcut is None]
    assert len(same) == 4
    assert torch.equal(same[0](h), h)


def test_fixup_scales_the_first_convolution_by_depth():
    wide = {depth: small(depth=depth, width=8) for depth in (10, 28)}
    for depth, net in wide.items():
        n_branches = (depth - 4) // 2
        weight = net.blocks[0].conv1.weight
        expected = (2 / (weight.shape[1] * 9)) ** 0.5 * n_branches**-0.5
        torch.testing.assert_close(weight.std().item(), expected, rtol=0.03, atol=0)


def test_fixup_has_its_scalars_and_no_norm():
    net = small(depth=16)
    kinds = [type(module) for module in net.modules()]
    n_blocks = len(net.blocks)
    assert kinds.count(Scale) == n_blocks
    assert kinds.count(Bias) == 4 * n_blocks + 2
    assert not {nn.BatchNorm2d, nn.GroupNorm} & set(kinds)
    assert all(module.bias is None for module in net.modules() if isinstance(module, nn.Conv2d))


def test_group_norm_fits_any_channels():
    block = ResidualBlock(12, 18, 1, Norm.GROUP)
    assert (block.pre1[0].num_groups, block.pre2[0].num_groups) == (4, 2)
    assert block(torch.randn(2, 12, 4, 4)).shape == (2, 18, 4, 4)


@pytest.mark.parametrize("norm", NORMS)
def test_learns_and_every_parameter_takes_part(norm):
    net = small(norm)
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(20) % 5
    prototypes = torch.randn(5, 2, 8, 8, generator=generator)
    x = prototypes[y] + 0.1 * torch.randn(20, 2, 8, 8, generator=generator)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    for _ in range(40):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimiser.step()
    assert loss < 0.5
    assert not [name for name, p in net.named_parameters() if torch.equal(p, start[name])]


@pytest.mark.parametrize("norm", ["fixup", "group", "none"])
def test_examples_do_not_mix(norm):
    net = small(norm).double()
    nn.init.normal_(net.classifier.weight)
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))
