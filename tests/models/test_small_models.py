from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_ws.models import MLP, MODEL_NAMES, Bias, LeNet, Scale, WideResNet, build_model


def test_bias_and_scale_start_as_identities():
    x = torch.randn(3, 4)
    for module in (Bias(), Scale()):
        (parameter,) = module.parameters()
        assert parameter.shape == (1,)
        assert torch.equal(module(x), x)
    bias, scale = Bias(), Scale()
    nn.init.constant_(bias.bias, 2.0)
    nn.init.constant_(scale.scale, 3.0)
    assert torch.equal(bias(x), x + 2)
    assert torch.equal(scale(x), x * 3)


@pytest.mark.parametrize("size", [12, 28, 32, (13, 40)])
def test_lenet_takes_images_of_its_size(size):
    height, width = (size, size) if isinstance(size, int) else size
    assert LeNet(3, 7, size)(torch.randn(2, 3, height, width)).shape == (2, 7)


def test_lenet_refuses_tiny_images():
    with pytest.raises(ValueError, match="image_size=11x28 is too small"):
        LeNet(1, 10, (11, 28))


@pytest.mark.parametrize("hidden", [(), (5,), [6, 4]])
def test_mlp_flattens_and_has_the_layers(hidden):
    net = MLP(12, hidden, 3, activation="tanh")
    assert net(torch.randn(2, 3, 2, 2)).shape == (2, 3)
    linears = [module for module in net if isinstance(module, nn.Linear)]
    assert [layer.in_features for layer in linears] == [12, *hidden]
    assert sum(isinstance(module, nn.Tanh) for module in net) == len(hidden)


def test_mlp_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown activation 'tan'; did you mean 'tanh'"):
        MLP(2, activation="tan")
    with pytest.raises(ValueError, match="at least 1"):
        MLP(2, (0,))


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("image_size", [16, (16, 20)])
def test_builds_every_model_for_the_shape_of_the_data(name, image_size):
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    net = build_model(name, in_channels=3, image_size=image_size, n_classes=4)
    assert net(torch.randn(2, 3, height, width)).shape == (2, 4)


def test_passes_options_on():
    shape = {"in_channels": 1, "image_size": 8, "n_classes": 2}
    net = build_model("wide-resnet", depth=10, width=1, norm="group", **shape)
    assert isinstance(net, WideResNet)
    assert len(net.blocks) == 3
    assert any(isinstance(module, nn.GroupNorm) for module in net.modules())
    assert isinstance(build_model("mlp", hidden=[3], activation="gelu", **shape)[2], nn.GELU)


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("wide-resent", {}, "unknown model 'wide-resent'; did you mean 'wide-resnet'"),
        ("wide-resnet", {"widht": 2}, "unknown option of model 'wide-resnet' 'widht'; did you mean 'width'"),
        ("mlp", {"in_features": 2}, "unknown option of model 'mlp' 'in_features'; did you mean"),
        ("lenet", {"depth": 2}, "unknown option of model 'lenet' 'depth'; there is none"),
    ],
)
def test_unknown_names_and_options_offer_the_nearest(name, options, problem):
    with pytest.raises(ValueError, match=problem):
        build_model(name, in_channels=1, image_size=16, n_classes=2, **options)
