from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_ws import kron_factors
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
        ("lenet", {"depth": 2}, "unknown option of model 'lenet' 'depth'; did you mean 'dropout'"),
    ],
)
def test_unknown_names_and_options_offer_the_nearest(name, options, problem):
    with pytest.raises(ValueError, match=problem):
        build_model(name, in_channels=1, image_size=16, n_classes=2, **options)


# ------------------------------------------------------------------ dropout

SHAPE = {"in_channels": 2, "image_size": 12, "n_classes": 3}
DROPPING = {
    "mlp": {"hidden": [6, 5]},
    "lenet": {},
    "wide-resnet": {"depth": 10, "width": 1, "norm": "fixup"},
}


def seeded(name, **options):
    torch.manual_seed(0)
    net = build_model(name, **SHAPE, **DROPPING[name], **options)
    for p in net.parameters():  # a new Fixup network computes zero
        nn.init.normal_(p, std=0.3)
    return net


def dropouts(net):
    return [module for module in net.modules() if isinstance(module, nn.Dropout)]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_network_without_dropout_has_no_trace_of_it(name):
    assert dropouts(seeded(name)) == []
    plain, zero = seeded(name), seeded(name, dropout=0.0)
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in zero.named_modules()]


@pytest.mark.parametrize(("name", "n_layers"), [("mlp", 3), ("lenet", 3), ("wide-resnet", 3)])
def test_dropout_is_before_each_linear_layer_or_within_each_block(name, n_layers):
    net = seeded(name, dropout=0.4)
    assert [module.p for module in dropouts(net)] == [0.4] * n_layers
    modules = list(net.modules())
    for module in dropouts(net):
        weights = (m for m in modules[modules.index(module) :] if isinstance(m, (nn.Linear, nn.Conv2d)))
        assert isinstance(next(weights), nn.Conv2d if name == "wide-resnet" else nn.Linear)
    for block in getattr(net, "blocks", []):
        assert isinstance(block.pre2[-1], nn.Dropout)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_dropout_changes_predictions_in_train_mode_alone(name):
    net, plain = seeded(name, dropout=0.5), seeded(name)
    x = torch.randn(4, 2, 12, 12)
    assert not torch.equal(net.train()(x), net(x))
    assert torch.equal(net.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("name", ["lenet", "wide-resnet"])
def test_parameters_keep_their_names_under_dropout(name):
    assert list(seeded(name, dropout=0.5).state_dict()) == list(seeded(name).state_dict())


@pytest.mark.parametrize("backend", ["native", "asdl", "backpack"])
def test_curvature_is_that_of_the_network_without_dropout(backend):
    batch = [(torch.randn(4, 6), torch.arange(4) % 3)]
    plain, dropping = MLP(6, (5,), 3), MLP(6, (5,), 3, dropout=0.5)
    with torch.no_grad():
        for p, q in zip(plain.parameters(), dropping.parameters(), strict=True):
            q.copy_(p)
    of_both = [kron_factors(net, "classification", batch, backend=backend) for net in (plain, dropping)]
    for kept, dropped in zip(*(kron.values() for kron in of_both), strict=True):
        torch.testing.assert_close(dropped.to_dense(), kept.to_dense())


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_impossible_dropout_is_refused(name, dropout):
    with pytest.raises(ValueError, match=rf"dropout={dropout:g} must be at least 0 and below 1"):
        seeded(name, dropout=dropout)
