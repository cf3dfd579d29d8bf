"""What stock ASDL does today that the backends correct: a canary that dies tells which correction to revisit."""

import warnings

import asdl
import pytest
import torch
import torch.nn.functional as F
from curvature.canary_nets import (
    Twice,
    image_net,
    outer,
    reference,
)
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


def fisher(model, x, fisher_type="fisher_exact", loss="cross_entropy", **kwargs):
    """What stock ASDL computes, as sums over the data."""
    maker = asdl.get_fisher_maker(model, asdl.FisherConfig(fisher_type, ["kron"], loss, data_size=1, **kwargs))
    maker.setup_model_call(model, x)
    maker.forward_and_backward()


@pytest.mark.parametrize("m", [1, 2, 5])
def test_asdl_mc_of_a_softmax_is_m_times_too_small(m, monkeypatch):
    """Each draw's loss is divided by M, hence its gradients' products by M²: the backend hands over columns that are scaled."""
    layer, x, labels = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.randint(3, (m, 6))
    draws = iter(labels)
    monkeypatch.setattr(torch.distributions.Categorical, "sample", lambda _: next(draws))
    _, g = reference(layer, layer, x, lambda f: f.softmax(-1) - F.one_hot(labels, 3))
    fisher(layer, x, "fisher_mc", n_mc_samples=m)
    torch.testing.assert_close(layer.fisher.kron.B, outer(g) / m / m)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("var", [1.0, 4.0])
def test_asdl_mc_of_a_gaussian_ignores_the_variance_in_the_loss(m, var, monkeypatch):
    """Labels have variance σ², the loss has 1, so B is σ⁴/M times the true one: the backend draws its own columns."""
    layer, x, noise = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.randn(m, 6, 3).double()
    draws = iter(noise)
    monkeypatch.setattr(torch.distributions.Normal, "sample", lambda d: d.mean + d.stddev * next(draws))
    _, g = reference(layer, layer, x, lambda f: -noise / var**0.5)
    fisher(layer, x, "fisher_mc", "mse", n_mc_samples=m, var=var)
    torch.testing.assert_close(layer.fisher.kron.B, var**2 / m * outer(g) / m)


def test_asdl_linear_with_positions_lacks_the_mean_over_them():
    """A of a Linear on [N, R, I] is R times the expand factor and B is right: the backend forms the factors itself."""
    model, x = nn.Sequential(nn.Linear(4, 2), nn.Flatten(), nn.Linear(10, 3)).double(), torch.randn(6, 5, 4).double()
    a, g = reference(model, model[0], x)
    fisher(model, x)
    torch.testing.assert_close(model[0].fisher.kron.A, outer(a))
    torch.testing.assert_close(model[0].fisher.kron.B, outer(g))


def test_asdl_conv2d_has_the_mean_over_positions():
    """A of a Conv2d is the expand factor, unlike that of a Linear: one correction for all layers would be wrong."""
    model, x = image_net(stride=2, padding=1)
    a, g = reference(model, model[0], x)
    fisher(model, x)
    torch.testing.assert_close(model[0].fisher.kron.A, outer(a) / a.shape[1])
    torch.testing.assert_close(model[0].fisher.kron.B, outer(g))


def test_asdl_sums_the_uses_of_a_module_without_counting_them():
    """A of a module called twice is twice the expand factor: the backend counts uses as positions."""
    model, x = Twice().double(), torch.randn(5, 3).double()
    a, g = reference(model, model.lin, x)
    fisher(model, x)
    torch.testing.assert_close(model.lin.fisher.kron.A, outer(a))
    torch.testing.assert_close(model.lin.fisher.kron.B, outer(g))


def test_asdl_refuses_a_softmax_per_token():
    """The exact Fisher broadcasts [N·T] with [N, C] on outputs [N, T, C]: the backend has its own loop over columns."""
    with pytest.raises(RuntimeError, match=r"size of tensor a \(15\) must match the size of tensor b \(2\)"):
        fisher(nn.Linear(4, 2), torch.randn(5, 3, 4))


def test_asdl_takes_tokens_for_outputs_of_a_regression():
    """On outputs [N, T, C] it loops over C positions with a column of ones: the backend has its own loop."""
    layer, x = nn.Linear(4, 2).double(), torch.randn(5, 3, 4).double()
    fisher(layer, x, loss="mse")
    torch.testing.assert_close(layer.fisher.kron.B, torch.full((2, 2), 5.0 * 2).double())
    with pytest.raises(IndexError, match="index 2 is out of bounds for dimension 1 with size 2"):
        fisher(nn.Linear(4, 3), torch.randn(5, 2, 4), loss="mse")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv1d(2, 4, 3), (2, 6)), (nn.Conv3d(2, 4, 2), (2, 3, 3, 3)), (nn.GroupNorm(2, 4), (4, 3))],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_asdl_skips_modules_in_silence(layer, shape):
    """Conv1d, Conv3d and GroupNorm get no factors and no warning: the backend registers an operation for each."""
    x = torch.randn(4, *shape)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(layer(x)[0].numel(), 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fisher(model, x)
    assert [hasattr(module, "fisher") for module in model] == [False, False, True]
    assert not [w for w in caught if "non-full backward hook" not in str(w.message)]


def test_asdl_warns_that_it_skips_a_layer_norm():
    """A LayerNorm has no Kronecker operation: the backend registers one for it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match="cov_kron operation is not supported for LayerNorm"):
        fisher(model, torch.randn(5, 4))
    assert [hasattr(module, "fisher") for module in model] == [True, False, True]


def test_asdl_ignores_groups():
    """A has all input channels where the weight has one group's: the backend forms grouped factors itself."""
    model, x = image_net(groups=2)
    a, _ = reference(model, model[0], x)
    fisher(model, x)
    assert model[0].weight.flatten(1).shape == (4, 9)
    assert model[0].fisher.kron.A.shape == (18, 18)
    torch.testing.assert_close(model[0].fisher.kron.A, outer(a) / a.shape[1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dilation": 2}, r"conv2d\.dilation has to be \(1, 1\)"),
        ({"padding": "same"}, r"too many values to unpack \(expected 2"),
    ],
    ids=["dilation", "same"],
)
def test_asdl_fails_in_the_forward_of_some_convolutions(kwargs, message):
    """Dilation and padding 'same' raise in the unfolding: the backend unfolds by itself."""
    with pytest.raises(ValueError, match=message):
        fisher(*image_net(**kwargs))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_asdl_pads_with_zeros_whatever_the_padding_mode(mode):
    """A is that of zero padding, without a word: the backend pads as the module does."""
    model, x = image_net(padding=1, padding_mode=mode)
    true, _ = reference(model, model[0], x)
    zeros, _ = reference(model, model[0], x, patches_of=nn.Conv2d(2, 4, 3, padding=1))
    fisher(model, x)
    torch.testing.assert_close(model[0].fisher.kron.A, outer(zeros) / zeros.shape[1])
    assert not torch.allclose(outer(zeros), outer(true), rtol=0.01)


class FailsInBackward(nn.Module):
    def forward(self, x):
        y = x * 1
        y.register_hook(self._fail)
        return y

    @staticmethod
    def _fail(_):
        raise ArithmeticError("in the backward")


def test_asdl_leaves_parameters_frozen_after_an_exception_in_the_backward():
    """`requires_grad` stays False and is next taken for the caller's wish: the backend asks for gradients
    without touching `requires_grad`."""
    model, x = nn.Sequential(nn.Linear(4, 3), FailsInBackward()), torch.randn(5, 4)
    with pytest.raises(ArithmeticError, match="in the backward"):
        fisher(model, x)
    assert [p.requires_grad for p in model.parameters()] == [False, False]
    assert [p._original_requires_grad for p in model.parameters()] == [True, True]
    with pytest.raises(RuntimeError, match="does not require grad"):
        fisher(model[:1], x)
    assert [p._original_requires_grad for p in model.parameters()] == [False, False]


def test_asdl_leaves_attributes_behind():
    """`fisher` stays on modules and `_original_requires_grad` on parameters: the backend leaves neither."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    fisher(model, torch.randn(5, 4))
    assert [hasattr(module, "fisher") for module in (model, *model)] == [False, True, False, True]
    assert all(p.requires_grad and p._original_requires_grad for p in model.parameters())


def test_asdl_spoils_modules_for_full_backward_hooks():
    """The flag of non-full hooks outlives the hooks: the backend resets `_is_full_backward_hook` to what it was."""
    layer = nn.Linear(4, 3)
    assert layer._is_full_backward_hook is None
    fisher(layer, torch.randn(5, 4))
    assert not layer._backward_hooks
    assert not layer._forward_hooks
    assert layer._is_full_backward_hook is False
    with pytest.raises(RuntimeError, match="Cannot use both regular backward hooks and full backward hooks"):
        layer.register_full_backward_hook(lambda *_: None)
    layer._is_full_backward_hook = None
    layer.register_full_backward_hook(lambda *_: None)


def test_asdl_hooks_are_deprecated():
    """torch warns of a non-full hook on a module of several autograd nodes: the backend filters this one warning."""
    model, x = nn.Sequential(nn.Linear(4, 2), nn.Flatten(), nn.Linear(10, 3)), torch.randn(6, 5, 4)
    with pytest.warns(FutureWarning, match="Using a non-full backward hook when the forward contains multiple"):
        fisher(model, x)


def test_asdl_leaves_gradients_alone():
    """`.grad` stays None, and stays itself where there was one: the backend need not save it."""
    layer = nn.Linear(4, 3)
    layer.bias.grad = torch.ones(3)
    fisher(layer, torch.randn(5, 4))
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.ones(3))


def test_asdl_draws_from_the_global_generator():
    """MC labels move the global state and `seed` resets it for the process: the backend draws from the caller's own."""
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        fisher(layer, x, "fisher_mc")
        assert not torch.equal(torch.get_rng_state(), before)
        fisher(layer, x, "fisher_mc", seed=1234)
        assert torch.initial_seed() == 1234
