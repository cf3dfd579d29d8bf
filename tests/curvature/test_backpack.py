"""The BackPACK backend beyond the conformance suite: many columns at once, and what it leaves behind: nothing."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from backend_coverage import refusal
from backpack import backpack, disable, extend
from backpack.extensions import BatchGrad, DiagGGNExact
from cases import CASES, WIDE_RESNETS, N
from curvature.shared import close, pulled, snapshot_with_backpack
from torch import nn

from laplace_ws import kron_factors
from laplace_ws.curvature import backpack as backend_module
from laplace_ws.curvature import exact
from laplace_ws.curvature.backend import trainable_parameters
from laplace_ws.curvature.backpack import BackpackBackend
from laplace_ws.curvature.native import NativeBackend

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

COVERED = [case for case in (*CASES, *WIDE_RESNETS) if refusal("backpack", case) is None]


@pytest.mark.parametrize("case", COVERED, ids=str)
def test_columns_at_once_are_the_columns_one_by_one(case):
    model, x, _ = case.make()
    model.eval()
    shape = model(x).shape
    columns = torch.randn(5, *shape, dtype=torch.float64)
    truth = pulled(NativeBackend(), model, x, lambda f: columns)
    for at_once in (1, 2, 5):
        found = pulled(BackpackBackend(), model, x, lambda f: columns, at_once)
        assert len(found) == len(truth)
        for ours, theirs in zip(found, truth, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_columns_at_once_fit_the_memory(monkeypatch):
    model, x, y = next(c for c in CASES if c.name == "residual-blocks").make()
    whole = kron_factors(model, "classification", [(x, y)], backend=BackpackBackend()).to_dense()
    sizes = []
    pullback = backend_module.BackpackLinearisation.pullback
    monkeypatch.setattr(
        backend_module.BackpackLinearisation, "pullback", lambda self, c: sizes.append(len(c)) or pullback(self, c)
    )
    for n_bytes in (1, 2**14, 2**40):
        monkeypatch.setattr(backend_module, "COLUMN_BYTES", n_bytes)
        close(kron_factors(model, "classification", [(x, y)], backend=BackpackBackend()).to_dense(), whole)
    assert sizes[:4] == [6, 1, 1, 1]  # the check, and one column fewer than classes
    assert sizes[-3:] == [6, 1, 2]


# ------------------------------------------------------------------ hygiene


class FailureInTheMiddleError(Exception):
    pass


@pytest.mark.parametrize("fails", ["not", "in the forward", "in the backward", "in a rule", "in the body"])
@pytest.mark.parametrize(
    "case", [c for c in [*CASES, *WIDE_RESNETS] if c.name in ("cnn", "fixup", "wide-resnet-batch")], ids=str
)
def test_leaves_everything_as_found(case, fails, monkeypatch):
    model, x, _ = case.make()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    backend, parameters = BackpackBackend(), trainable_parameters(model.eval())
    columns = torch.randn(3, N, *model(x).shape[1:], dtype=torch.float64)

    def fail(*args, **kwargs):
        raise FailureInTheMiddleError

    def use(fails):
        with backend.linearise(model, x, parameters) as linearisation:
            if fails == "in a rule":
                monkeypatch.setattr(backend_module, "transposed_jacobian_products", fail)
            elif fails == "in the backward":
                monkeypatch.setattr(backend_module._Columns, "keep", fail)
            linearisation.pullback(columns)
            if fails == "in the body":
                raise FailureInTheMiddleError

    def attempt():
        if fails == "in the forward":
            monkeypatch.setattr(backend_module, "check_outputs", fail)
        with pytest.raises(FailureInTheMiddleError):
            use(fails)
        monkeypatch.undo()

    before = snapshot_with_backpack(model)
    for _ in range(2):
        if fails != "not":
            attempt()
        use("not")
        assert snapshot_with_backpack(model) == before
    assert not any("output" in vars(step.leaf) or "input0" in vars(step.leaf) for step in backend._cached.chain.steps)


def test_no_quantity_is_left_over(monkeypatch):
    extensions = []
    make_columns = backend_module._Columns
    monkeypatch.setattr(
        backend_module, "_Columns", lambda *args: extensions.append(make_columns(*args)) or extensions[-1]
    )
    for case in CASES:
        if refusal("backpack", case) is None:
            model, x, y = case.make()
            kron_factors(model, case.likelihood, [(x, y)], backend=BackpackBackend())
    assert len(extensions) > 50
    assert not any(extension.saved_quantities._saved_quantities for extension in extensions)


def test_no_weight_gradient_and_one_forward():
    model, x, _ = next(c for c in CASES if c.name == "residual-blocks").make()
    calls = []
    model.eval().register_forward_hook(lambda *_: calls.append("forward"))
    for p in model.parameters():
        p.register_hook(lambda g: calls.append("weight gradient"))
    pulled(BackpackBackend(), model, x, lambda f: torch.randn(3, *f.shape, dtype=f.dtype), 3)
    assert calls == ["forward"]


def test_model_that_its_user_has_extended_goes_on_working():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randint(0, 3, (N,))
    truth = kron_factors(model, "classification", [(x, y)]).to_dense()
    extend(model)
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    with backpack(DiagGGNExact(), BatchGrad()):
        value = loss(model(x), y)
        with disable():
            found = pulled(BackpackBackend(), model, x, lambda f: torch.ones(2, *f.shape, dtype=f.dtype), 2)
        assert [g.shape for g in found] == [(2, N, 4), (2, N, 3)]
        value.backward()
    expected = exact.ggn(model, "classification", x, y).diagonal()
    close(torch.cat([p.diag_ggn_exact.flatten() for p in model.parameters()]), expected)
    close(kron_factors(model, "classification", [(x, y)], backend=BackpackBackend()).to_dense(), truth)
    assert all(p.grad_batch.shape == (N, *p.shape) for p in model.parameters())


# ------------------------------------------------------------------ the converted model


@pytest.fixture
def conversions(monkeypatch):
    made = []
    convert = backend_module.convert
    monkeypatch.setattr(backend_module, "convert", lambda *args, **kwargs: made.append(1) or convert(*args, **kwargs))
    return made


def changing_net():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(48, 2)
    ).double()


CHANGES = {
    "weight": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(3, 2, 3, 3).double())),
    "buffer": lambda m: setattr(m[1], "running_mean", torch.randn(3).double()),
    "attribute": lambda m: setattr(m[2], "negative_slope", 0.5),
    "module": lambda m: m.__setitem__(2, nn.ReLU()),
    "mode": lambda m: m.eval(),
    "hook": lambda m: m[2].register_forward_hook(lambda module, args, output: output * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_noticed(change, conversions):
    model, x = changing_net(), torch.randn(N, 2, 4, 4, dtype=torch.float64)
    model(x)
    model[0 if change == "mode" else slice(None)].eval()
    model[1].eval()
    backend = BackpackBackend()
    columns = torch.randn(2, N, 2, dtype=torch.float64)
    for _ in range(2):
        before = pulled(backend, model, x, lambda f: columns)
    assert len(conversions) == 1
    CHANGES[change](model)
    after = pulled(backend, model, x, lambda f: columns)
    assert len(conversions) == 2
    for ours, theirs in zip(after, pulled(NativeBackend(), model, x, lambda f: columns), strict=True):
        close(ours, theirs)
    assert change in ("mode", "buffer", "weight") or not torch.equal(before[0], after[0])


def test_new_values_of_parameters_need_no_conversion(conversions):
    model, x = changing_net().eval(), torch.randn(N, 2, 4, 4, dtype=torch.float64)
    backend, columns = BackpackBackend(), torch.randn(2, N, 2, dtype=torch.float64)
    for _ in range(3):
        with torch.no_grad():
            for tensor in (*model.parameters(), model[1].running_mean):
                tensor.add_(0.1)
        model[4].bias.requires_grad_(not model[4].bias.requires_grad)
        for ours, theirs in zip(
            *(pulled(b, model, x, lambda f: columns) for b in (backend, NativeBackend())), strict=True
        ):
            close(ours, theirs)
    assert len(conversions) == 1


def test_the_converted_model_lives_no_longer_than_the_model():
    model, backend = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), BackpackBackend()
    pulled(backend, model, torch.randn(4, 3), lambda f: torch.randn(1, 4, 2))
    died = weakref.ref(model)
    del model
    gc.collect()
    assert died() is None
    assert pickle.loads(pickle.dumps(backend))._cached is None
    assert copy.deepcopy(backend)._cached is None


def test_linearisations_within_each_other():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    backend, parameters, columns = BackpackBackend(), trainable_parameters(model), torch.randn(2, 4, 2)
    with backend.linearise(model, x, parameters) as outer:
        truth = outer.pullback(columns)
        with backend.linearise(model, x + 1, parameters) as inner:
            assert not torch.equal(inner.pullback(columns)[0], truth[0])
            assert torch.equal(outer.pullback(columns)[0], truth[0])
        assert torch.equal(outer.pullback(columns)[0], truth[0])
