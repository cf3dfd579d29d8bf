"""What the stock libraries do today that the backends correct: a canary that dies tells which correction to revisit."""

import warnings
from collections import Counter
from copy import deepcopy

import asdl
import pytest
import torch
import torch.nn.functional as F
from backpack import backpack, extend
from backpack import extensions as ext
from backpack.context import CTX
from backpack.core.derivatives.conv2d import Conv2DDerivatives
from backpack.custom_module.branching import Parallel
from backpack.extensions.saved_quantities import SavedQuantities
from curvlinops import KFACLinearOperator
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


@pytest.fixture(autouse=True)
def _own_hooks():
    """BackPACK keeps the handles of every hook in one global list."""
    before = list(CTX.hook_handles)
    yield
    for handle in CTX.hook_handles[len(before) :]:
        handle.remove()
    CTX.hook_handles = before


class Twice(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.lin = nn.Linear(3, 3, **kwargs)

    def forward(self, x):
        return self.lin(torch.tanh(self.lin(x)))


class Then(nn.Module):
    """A layer, an in-place ReLU, and what the test has of its own."""

    def __init__(self, then):
        super().__init__()
        self.lin, self.relu, self._then = nn.Linear(3, 3), nn.ReLU(inplace=True), then

    def forward(self, x):
        return self._then(self, self.relu(self.lin(x)))


def image_net(**kwargs):
    """A convolution of 4 images of 2 channels and 5×5 pixels, and a linear readout."""
    conv, x = nn.Conv2d(2, 4, 3, **kwargs), torch.randn(4, 2, 5, 5)
    readout = nn.Linear(conv(x)[0].numel(), 3)
    return nn.Sequential(conv, nn.Flatten(), readout).double(), x.double()


def softmax_root(f):
    """Columns [C, N, C] of a square root of diag(p) − ppᵀ."""
    p = f.softmax(-1).detach()
    s = p.sqrt()
    return (torch.diag_embed(s) - p[..., :, None] * s[..., None, :]).movedim(-1, 0)


def in_positions(layer, a):
    if isinstance(layer, nn.Linear):
        return a.reshape(len(a), -1, a.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(a, [layer.padding[1]] * 2 + [layer.padding[0]] * 2, mode=mode)
    return F.unfold(padded, layer.kernel_size, stride=layer.stride).mT


def out_positions(layer, z):
    return z.reshape(len(z), -1, z.shape[-1]) if isinstance(layer, nn.Linear) else z.flatten(2).mT


def reference(model, layer, x, root=softmax_root, patches_of=None):
    """Inputs a [N, R, I] and back-propagated columns g [C, N, R, O] of a layer by plain autograd, uses as positions."""
    calls = []
    handle = layer.register_forward_hook(lambda _, args, out: calls.append((args[0].detach(), out)))
    f = model(x)
    handle.remove()
    a = torch.cat([in_positions(patches_of or layer, a) for a, _ in calls], 1)
    outputs = [z for _, z in calls]
    columns = [torch.autograd.grad(f, outputs, s, retain_graph=True) for s in root(f)]
    return a, torch.stack([torch.cat([out_positions(layer, g) for g in column], 1) for column in columns])


def outer(v):
    """Σ v vᵀ over all but the last dimension."""
    v = v.flatten(0, -2)
    return v.mT @ v


# ---- ASDL


def fisher(model, x, fisher_type="fisher_exact", loss="cross_entropy", **kwargs):
    """What stock ASDL computes, as sums over the data."""
    maker = asdl.get_fisher_maker(model, asdl.FisherConfig(fisher_type, ["kron"], loss, data_size=1, **kwargs))
    maker.setup_model_call(model, x)
    maker.forward_and_backward()


@pytest.mark.parametrize("m", [1, 2, 5])
def test_asdl_mc_of_a_softmax_is_m_times_too_small(m, monkeypatch):
    """Each draw's loss is divided by M, hence its gradients' products by M²: the ASDL backend multiplies B by M."""
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
    """`requires_grad` stays False and is next taken for the caller's wish: the backend restores it in a `finally`."""
    model, x = nn.Sequential(nn.Linear(4, 3), FailsInBackward()), torch.randn(5, 4)
    with pytest.raises(ArithmeticError, match="in the backward"):
        fisher(model, x)
    assert [p.requires_grad for p in model.parameters()] == [False, False]
    assert [p._original_requires_grad for p in model.parameters()] == [True, True]
    with pytest.raises(RuntimeError, match="does not require grad"):
        fisher(model[:1], x)
    assert [p._original_requires_grad for p in model.parameters()] == [False, False]


def test_asdl_leaves_attributes_behind():
    """`fisher` stays on modules and `_original_requires_grad` on parameters: the backend deletes both."""
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


# ---- BackPACK

LABELS = torch.tensor([0, 1, 2, 0])


def backprop(model, x, *extensions, loss=None, y=LABELS, **kwargs):
    loss = extend(loss or nn.CrossEntropyLoss(reduction="sum"))
    with backpack(*extensions, **kwargs):
        loss(model(x), y).backward()


@pytest.mark.parametrize("kwargs", [{}, {"stride": 2, "padding": 1}], ids=["plain", "strided"])
def test_backpack_convolution_is_neither_expand_nor_reduce(kwargs):
    """B is the reduce factor and A is R times the expand factor: the BackPACK backend has a rule of its own."""
    model, x = image_net(**kwargs)
    a, g = reference(model, model[0], x)
    backprop(extend(model), x, ext.KFLR())
    stock_b, stock_a = model[0].weight.kflr
    torch.testing.assert_close(stock_b, outer(g.sum(-2)))
    torch.testing.assert_close(stock_a, a.shape[1] * outer(a) / a.shape[:2].numel())
    torch.testing.assert_close(model[0].bias.kflr[0], stock_b)


def test_backpack_linear_is_the_true_factor():
    """With one position B and A are the project's, so only what shares weights needs a correction."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double(), torch.randn(4, 3).double()
    a, g = reference(model, model[0], x)
    backprop(extend(model), x, ext.KFLR())
    torch.testing.assert_close(model[0].weight.kflr, [outer(g), outer(a) / 4])


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.Linear(4, 3), (2, 4), r"Only 2d inputs are supported by KFLR \(got 3\)"),
        (nn.Conv2d(2, 2, 3, groups=2), (2, 4, 4), r"groups ≠ 1 is not supported by KFLR \(got 2\)"),
        (nn.LayerNorm(4), (4,), r"does not have an extension for Module .*LayerNorm"),
        (nn.GroupNorm(2, 4), (4, 3), r"does not have an extension for Module .*GroupNorm"),
        (nn.BatchNorm1d(4).eval(), (4,), r"does not have an extension for Module .*BatchNorm1d"),
    ],
    ids=["tokens", "groups", "layer norm", "group norm", "batch norm"],
)
def test_backpack_kflr_refuses(layer, shape, message):
    """Positions of a Linear, groups and normalisations raise: the backend registers module extensions of its own."""
    x, layer = torch.randn(4, *shape), deepcopy(layer)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(layer(x)[0].numel(), 3))
    with pytest.raises(NotImplementedError, match=message):
        backprop(extend(model), x, ext.KFLR())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = self.stem(x)
        return x + self.branch(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: extend(nn.Sequential(nn.Linear(3, 3), Parallel(nn.Identity(), nn.Linear(3, 3)))),
        lambda: extend(Residual(), use_converter=True),
    ],
    ids=["parallel", "converted"],
)
def test_backpack_kflr_has_no_branch_rule(make):
    """KFLR cannot add what two branches send back, as KFAC and DiagGGNExact can: the backend's extension adds them."""
    for extension in (ext.KFAC(), ext.DiagGGNExact()):
        backprop(make(), torch.randn(4, 3), extension)
    with pytest.raises(NotImplementedError, match="No accumulation rule for backpropagated info specified"):
        backprop(make(), torch.randn(4, 3), ext.KFLR())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_backpack_mse_has_twice_the_gaussian_hessian(reduction):
    """Λ = 2I of a squared error without ½, over N·C for the mean: the backend back-propagates columns of its own."""
    layer, x = extend(nn.Linear(4, 3).double()), torch.randn(5, 4).double()
    backprop(layer, x, ext.SqrtGGNExact(), loss=nn.MSELoss(reduction=reduction), y=torch.zeros(5, 3).double())
    scale = {"sum": 2.0, "mean": 2.0 / (5 * 3)}[reduction]
    torch.testing.assert_close(outer(layer.bias.sqrt_ggn_exact), 5 * scale * torch.eye(3).double())


def test_backpack_writes_gradients_in_backward_and_not_in_autograd_grad():
    """`.backward()` fills `.grad`; `autograd.grad` runs the same rules and does not: the backend calls that."""
    layer, x, loss = extend(nn.Linear(4, 3)), torch.randn(4, 4), extend(nn.CrossEntropyLoss())
    with backpack(ext.KFLR()):
        torch.autograd.grad(loss(layer(x), LABELS), list(layer.parameters()))
    assert layer.weight.grad is None
    by_grad = layer.weight.kflr
    with backpack(ext.KFLR()):
        loss(layer(x), LABELS).backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(by_grad, layer.weight.kflr)


def test_backpack_draws_from_the_global_generator():
    """KFAC's labels move the global state: the backend draws from the caller's own generator."""
    layer, x, before = extend(nn.Linear(4, 3)), torch.randn(4, 4), torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        backprop(layer, x, ext.KFAC())
        assert not torch.equal(torch.get_rng_state(), before)


def stored(module):
    return sorted(name for name in vars(module) if name == "output" or name.startswith("input"))


def test_backpack_leaves_hooks_and_tensors_behind():
    """A flag, two hooks, results, and tensors of a forward with no backward stay: the backend removes them."""
    model = extend(nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 3)))
    assert [getattr(module, "_backpack_extend", False) for module in (model, *model)] == [False, True, True, True]
    assert [len(module._forward_hooks) for module in model] == [1, 1, 1]
    assert [(len(module._backward_hooks), module._is_full_backward_hook) for module in model] == [(1, True)] * 3
    f = model(torch.randn(4, 3))
    assert [stored(module) for module in model] == [["input0", "output"]] * 3
    with backpack(ext.KFLR(), retain_graph=True):
        extend(nn.CrossEntropyLoss())(f, LABELS).backward(retain_graph=True)
    assert [stored(module) for module in model] == [["input0", "output"]] * 3
    F.cross_entropy(f, LABELS).backward()
    assert [stored(module) for module in model] == [[]] * 3
    assert all(hasattr(p, "kflr") for p in model.parameters())


def test_backpack_remove_hooks_is_for_the_whole_process_and_for_good():
    """`CTX.remove_hooks` strips every model, and the flag stops a new `extend`: the backend removes its own handles."""
    mine, yours = extend(nn.Linear(3, 3)), extend(nn.Linear(3, 3))
    ours = CTX.hook_handles[-4:]
    CTX.hook_handles, others = ours, CTX.hook_handles[:-4]
    CTX.remove_hooks()
    CTX.hook_handles = others
    extend(mine)
    assert mine._backpack_extend
    assert not mine._forward_hooks
    assert not yours._forward_hooks


def test_backpack_breaks_an_in_place_activation():
    """A full backward hook's output is a view that nothing may change in place: the backend works on a copy."""
    model = extend(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)))
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        model(torch.randn(4, 3))


def convert(then):
    """The caller's model after a conversion, and the graph's own calls."""
    model = Then(then)
    graph = extend(model, use_converter=True)
    calls = [node.op for node in graph.graph.nodes if node.op.startswith("call_") and node.op != "call_module"]
    return model, graph, calls


def test_backpack_converter_alters_the_callers_model():
    """It turns `inplace` off and adds modules on the caller's own model: the backend converts a copy."""
    model, graph, calls = convert(lambda net, h: h * 2.0)
    assert not model.relu.inplace
    assert [name for name, _ in model.named_children()] == ["lin", "relu", "scale_module0"]
    assert graph.lin is model.lin
    assert calls == []


@pytest.mark.parametrize("then", [lambda net, h: h * h, lambda net, h: h * 2], ids=["tensors", "int"])
def test_backpack_converter_refuses_products_but_with_a_float(then):
    """`tensor * tensor` and `tensor * 2` raise: the backend converts what it can and says what it cannot."""
    model = Then(then)
    with pytest.raises(RuntimeError, match=r"Expecting types \[float, Node\]"):
        extend(model, use_converter=True)
    assert model.relu.inplace


@pytest.mark.parametrize(
    ("then", "op"),
    [
        (lambda net, h: F.relu(h), "call_function"),
        (lambda net, h: torch.mul(h, 2.0), "call_function"),
        (lambda net, h: h.mul(2.0), "call_method"),
    ],
    ids=["F.relu", "torch.mul", "mul"],
)
def test_backpack_converter_leaves_functions_with_a_warning(then, op):
    """Second order then fails in the backward with no quantity: the backend refuses such a graph before it runs it."""
    with pytest.warns(UserWarning, match=f"may break second-order extensions: op={op}"):
        _, graph, calls = convert(then)
    assert calls == [op]
    with pytest.raises(AssertionError, match="expects a backpropagation quantity but it is None"):
        backprop(graph, torch.randn(4, 3), ext.DiagGGNExact())


@pytest.mark.filterwarnings("ignore:Encountered node that may break")
@pytest.mark.parametrize(
    ("then", "message"),
    [
        (lambda net, h: h + h.sum(0, keepdim=True), "Shapes don't match"),
        (lambda net, h: h + 1.0, "Expecting tuple of tensors"),
    ],
    ids=["broadcast", "constant"],
)
def test_backpack_converter_turns_sums_into_modules_that_refuse(then, message):
    """SumModule wants tensors of one shape, so a network that ran stops running: the backend has a sum of its own."""
    model, graph, _ = convert(then)
    with pytest.raises(AssertionError, match=message):
        graph(torch.randn(4, 3))
    assert model(torch.randn(4, 3)).shape == (4, 3)


def test_backpack_keys_quantities_by_address():
    """A view has the key of its base: the backend must not tell tensors by their address alone."""
    base, quantities = torch.randn(4, 6), SavedQuantities()
    quantities.save_quantity(base.data_ptr(), "of the base", lambda old, new: f"{old}, {new}")
    quantities.save_quantity(base.flatten()[:2].data_ptr(), "of a view", lambda old, new: f"{old}, {new}")
    assert quantities.retrieve_quantity(base.data_ptr(), delete_old=True) == "of the base, of a view"


@pytest.mark.parametrize("flat_last", [False, True], ids=["flat first", "flat last"])
def test_backpack_mixes_a_flattened_branch_with_its_base(flat_last):
    """Whether a branch that starts with Flatten works depends on the order of branches: same correction."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
    branches = [flat, nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(9, 3))]
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), Parallel(*(branches[::-1] if flat_last else branches)))
    if flat_last:
        return backprop(extend(model), torch.randn(4, 1, 3, 3), ext.DiagGGNExact())
    with pytest.raises(RuntimeError, match=r"size of tensor a \(3\) must match the size of tensor b \(9\)"):
        backprop(extend(model), torch.randn(4, 1, 3, 3), ext.DiagGGNExact())


def test_backpack_extension_object_is_not_reusable_on_an_input_with_gradient():
    """What was sent back to the input meets the next pass: the backend makes a new extension for each."""
    layer, x, extension = extend(nn.Linear(3, 3)), torch.randn(4, 3, requires_grad=True), ext.KFLR()
    backprop(layer, x, extension)
    assert list(extension.saved_quantities._saved_quantities) == [x.data_ptr()]
    with pytest.raises(NotImplementedError, match="No accumulation rule"):
        backprop(layer, x, extension)


def test_backpack_circular_padding_is_silently_zero_padding():
    """Parameter and input rules both pad with zeros: the backend pads in a step of its own."""
    model, x = image_net(padding=1, padding_mode="circular")
    conv = model[0]
    z = conv(x)
    (g,) = torch.autograd.grad(F.cross_entropy(model[1:](z), LABELS, reduction="sum"), z, retain_graph=True)
    true_x = x.clone().requires_grad_()
    (vjp,) = torch.autograd.grad(conv(true_x), true_x, g)
    backprop(extend(model), x, ext.BatchGrad())
    per_example = [
        torch.nn.grad.conv2d_weight(x[i : i + 1], conv.weight.shape, g[i : i + 1], padding=1) for i in range(4)
    ]
    torch.testing.assert_close(conv.weight.grad_batch, torch.stack(per_example))
    assert not torch.allclose(conv.weight.grad_batch.sum(0), conv.weight.grad, rtol=0.01)
    model(x)
    stock = Conv2DDerivatives().jac_t_mat_prod(conv, None, None, g[None])[0]
    torch.testing.assert_close(stock, torch.nn.grad.conv2d_input(x.shape, conv.weight, g, padding=1))
    assert not torch.allclose(stock, vjp, rtol=0.01)


def test_backpack_keeps_only_the_last_use_of_a_module():
    """The first use finds no tensors, or with `retain_graph` the last use's: the backend keeps a record per use."""
    model, x = Twice().double(), torch.randn(4, 3).double()
    a, g = reference(model, model.lin, x, lambda f: (f.softmax(-1) - F.one_hot(LABELS, 3))[None])
    extend(model.lin)
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'output'"):
        backprop(model, x, ext.BatchGrad())
    backprop(model, x, ext.BatchGrad(), retain_graph=True)
    torch.testing.assert_close(model.lin.weight.grad_batch, g[0, :, 0, :, None] * a[:, 1, None, :])


def test_backpack_converter_copies_a_repeated_module_unless_it_has_parameters():
    """A repeated ReLU becomes two and a repeated Linear raises: the backend treats uses as positions instead."""
    _, graph, _ = convert(lambda net, h: net.relu(h))
    assert [name for name, _ in graph.named_children()] == ["lin", "relu0", "relu1"]
    with pytest.raises(NotImplementedError, match="Cycle with parameters detected"):
        extend(Twice(), use_converter=True)


def test_backpack_extends_a_container_with_a_forward_of_its_own():
    """Such a container is taken for an operation, and raises or warns: the backend extends leaves only."""
    with pytest.raises(NotImplementedError, match=r"does not have an extension for Module .*Residual"):
        backprop(extend(Residual()), torch.randn(4, 3), ext.KFLR())
    with pytest.warns(UserWarning, match=r"Module .*Residual.* although the module has parameters"):
        backprop(extend(Residual()), torch.randn(4, 3), ext.BatchGrad())


# ---- curvlinops


def operator(model, params, x, kfac_approx="expand", loss=None, y=LABELS):
    """Dense K-FAC of `params`, the exact GGN of a sum over the data."""
    loss = loss or nn.CrossEntropyLoss(reduction="sum")
    op = KFACLinearOperator(
        model, loss, params, [(x, y)], fisher_type="type-2", kfac_approx=kfac_approx, check_deterministic=False
    )
    return op @ torch.eye(sum(p.numel() for p in params), dtype=x.dtype)


APPROX = ["expand", "reduce"]


def kfac(a, g, approx):
    a, g = (a, g) if approx == "expand" else (a.mean(1, keepdim=True), g.sum(2, keepdim=True))
    return torch.kron(outer(g), outer(a) / a.shape[:2].numel())


@pytest.mark.parametrize("approx", APPROX)
def test_curvlinops_is_the_design_on_a_plain_convolution(approx):
    """Both approximations are the project's: it is an oracle for Linear and for Conv2d with zero padding."""
    model, x = image_net(padding=1, stride=2)
    a, g = reference(model, model[0], x)
    torch.testing.assert_close(operator(model, [model[0].weight], x, approx), kfac(a, g, approx))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv1d(2, 2, 3), torch.zeros(4, 2, 5)),
        (nn.ConvTranspose2d(2, 2, 3), torch.zeros(4, 2, 4, 4)),
        (nn.LayerNorm(4), torch.zeros(4, 4)),
        (nn.Embedding(5, 3), torch.zeros(4, dtype=torch.long)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_curvlinops_knows_linear_and_conv2d_only(layer, x):
    """Any other parameter in the list raises: the tests pass it a filtered list of parameters."""
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(layer(x)[0].numel(), 3))
    with pytest.raises(NotImplementedError, match="Found parameters in un-supported layers"):
        operator(model, list(model.parameters()), x)


@pytest.mark.parametrize("approx", APPROX)
def test_curvlinops_circular_padding_is_silently_zero_padding(approx):
    """A is that of zero padding: no oracle here, the tests use the dense ones."""
    model, x = image_net(padding=1, padding_mode="circular")
    true = kfac(*reference(model, model[0], x), approx)
    zeros = kfac(*reference(model, model[0], x, patches_of=nn.Conv2d(2, 4, 3, padding=1)), approx)
    torch.testing.assert_close(operator(model, [model[0].weight], x, approx), zeros)
    assert not torch.allclose(zeros, true, rtol=0.01)


@pytest.mark.parametrize("approx", APPROX)
def test_curvlinops_averages_the_patches_of_groups(approx):
    """One A for all groups, of the mean of their patches, and B across them: no oracle for grouped convolutions."""
    model, x = image_net(groups=2)
    a, g = reference(model, model[0], x)
    averaged = a.unflatten(-1, (2, 9)).mean(-2)
    torch.testing.assert_close(operator(model, [model[0].weight], x, approx), kfac(averaged, g, approx))


@pytest.mark.parametrize("approx", APPROX)
def test_curvlinops_sums_the_uses_of_a_module_in_both_factors(approx):
    """Of U uses it makes U times the expand block, in reduce as well: no oracle for shared modules."""
    model, x = Twice(bias=False).double(), torch.randn(4, 3).double()
    a, g = reference(model, model.lin, x)
    torch.testing.assert_close(operator(model, [model.lin.weight], x, approx), 2 * kfac(a, g, "expand"))


def test_curvlinops_keeps_the_last_of_two_tied_modules():
    """The block of a weight tied between modules is the last module's alone: no oracle for tied weights."""
    model, x = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(2)]).double(), torch.randn(4, 3).double()
    model[1].weight = model[0].weight
    a, g = reference(model, model[1], x)
    torch.testing.assert_close(operator(model, [model[0].weight], x), kfac(a, g, "expand"))


def test_curvlinops_refuses_uneven_same_padding():
    """'same' with an even kernel raises in expand: no oracle there."""
    model, x = image_net(padding="same")
    operator(model, [model[0].weight], x)
    model[0] = nn.Conv2d(2, 4, 2, padding="same").double()
    with pytest.raises(NotImplementedError, match="Unequal padding not supported in unfold"):
        operator(model, [model[0].weight], x)


def test_curvlinops_mse_has_twice_the_gaussian_hessian():
    """Λ = 2I as in BackPACK: comparisons for regression divide by 2."""
    layer, x = nn.Linear(4, 3, bias=False).double(), torch.randn(5, 4).double()
    stock = operator(layer, [layer.weight], x, loss=nn.MSELoss(reduction="sum"), y=torch.zeros(5, 3).double())
    torch.testing.assert_close(stock, torch.kron(5 * 2 * torch.eye(3).double(), outer(x) / 5))


# ---- torch


class Names(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_torch_attention_is_one_call_to_a_function_mode(training):
    """A mode sees no linear inside and no hook of `out_proj` fires: attention needs a treatment of its own."""
    model, x, fired = nn.MultiheadAttention(4, 2).train(training), torch.randn(3, 2, 4), []
    model.out_proj.register_forward_hook(lambda *_: fired.append(1))
    with Names() as names:
        model(x, x, x)
    assert names.seen["multi_head_attention_forward"] == 1
    assert names.seen["linear"] == 0
    assert fired == []


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(2, 2)

    def forward(self, x):
        return self.second(self.first(x))


def test_torch_functional_call_corrupts_a_module_of_two_names():
    """The values passed in stay for good, but for `tie_weights=False`: the package does not call it."""
    model, x = TwoNames(), torch.ones(1, 2)
    weight, passed = model.first.weight, {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert list(passed) == ["first.weight", "first.bias"]
    assert not functional_call(model, passed, x, tie_weights=False).any()
    assert model.first.weight is weight
    assert not functional_call(model, passed, x).any()
    assert model.first.weight is passed["first.weight"]
    assert not isinstance(model.first.weight, nn.Parameter)


def test_torch_functional_call_restores_a_weight_tied_between_modules():
    """One parameter in two modules is tied and restored, as it should be: only modules of two names need care."""
    model, x = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(2)]), torch.ones(1, 2)
    weight = model[1].weight = model[0].weight
    assert not functional_call(model, {"0.weight": torch.zeros(2, 2)}, x).any()
    assert model[0].weight is weight
    assert model[1].weight is weight
