"""What a backend cannot see, or would take for something else, is noticed before it is believed."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laplace_ws import InvalidBatchError, Laplace, UnsupportedParameterError, kron_factors
from laplace_ws.curvature import FACTOR_BACKENDS, NativeBackend, checks, exact, jacobians


class Hidden(torch.autograd.Function):
    """A linear map that no function mode sees into."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.mm(w.t())

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g.mm(w), g.t().mm(x)


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.w, self.p = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(1, 3))
        self._forward = forward

    def forward(self, x):
        return self._forward(self, F.linear(x, self.w) + self.p)


def in_place_on_a_view(net, y):
    y = y * 1
    y.view(-1, 3)[:, :3].add_(net.p)
    return y


def mixed_with_the_next_but_one(net, y):
    return y + y.roll(2, 0)


HIDDEN = {
    "custom function": (lambda net, y: Hidden.apply(y, net.w), "'w' is used by linear, but not by that alone"),
    "in place on a view": (in_place_on_a_view, "'p' is used by add, add_, but not by that alone"),
    "mixed examples": (mixed_with_the_next_but_one, "rows that are not grouped by example"),
    "centred and mixed": (
        lambda net, y: (z := y - y.mean(-1, keepdim=True)) + z.roll(1, 0),
        "rows that are not grouped by example",
    ),
    "detached": (lambda net, y: y.detach(), "the outputs of Net do not depend on any parameter that requires grad"),
    "random": (lambda net, y: F.dropout(y, 0.5, training=True), "gives other outputs for the same inputs"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_uses_and_mixed_examples_are_refused(name):
    forward, message = HIDDEN[name]
    model, x, y = Net(forward).double(), torch.randn(6, 3).double(), torch.randn(6, 3).double()
    rng = torch.get_rng_state()
    for take in (lambda: Laplace(model, "regression").check(x), lambda: kron_factors(model, "regression", [(x, y)])):
        with pytest.raises(UnsupportedParameterError, match=message):
            take()
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_first_batch_of_one_example_does_not_pass_for_a_check():
    model = Net(mixed_with_the_next_but_one)
    data = [(torch.randn(1, 3), torch.randn(1, 3)), (torch.randn(4, 3), torch.randn(4, 3))]
    with pytest.raises(UnsupportedParameterError, match="not grouped by example"):
        kron_factors(model, "regression", data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checks_pass_an_honest_network_in_every_precision(dtype):
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)).to(dtype)
    Laplace(model, "classification").check(torch.randn(7, 2, 6, 6).to(dtype))


def test_inference_mode_is_refused_and_no_grad_is_not():
    model, data = nn.Linear(3, 2), [(torch.randn(4, 3), torch.randn(4, 2))]
    with torch.no_grad():
        inside = kron_factors(model, "regression", data)
    torch.testing.assert_close(inside.to_dense(), kron_factors(model, "regression", data).to_dense())
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"leave it, or use torch\.no_grad"):
        kron_factors(model, "regression", data)


def test_a_train_method_of_the_module_is_called():
    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(3, 2), nn.Dropout())
    model[1].eval()
    kron_factors(model, "regression", [(torch.randn(4, 3), torch.randn(4, 2))])
    assert (model.training, model[0].training, model[0].merged, model[1].training) == (True, True, False, False)


# ------------------------------------------------------------------ batches of one example, batches unlike the first


@pytest.mark.parametrize("name", ["custom function", "in place on a view"])
def test_hidden_uses_are_refused_in_batches_of_one(name):
    forward, message = HIDDEN[name]
    model, x, y = Net(forward).double(), torch.randn(4, 3).double(), torch.randn(4, 3).double()
    data = [(x[i : i + 1], y[i : i + 1]) for i in range(4)]
    for take in (
        lambda: kron_factors(model, "regression", data),
        lambda: jacobians(model, x[:1]),
    ):
        with pytest.raises(UnsupportedParameterError, match=message):
            take()


class Packed(nn.Module):
    """Runs its layer on the tokens that are not padding, in one tensor without an axis of examples."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        is_token = x[..., 0] > -5
        h = torch.tanh(self.layer(x[is_token]))
        out = h.new_zeros(*x.shape[:2], 4)
        out[is_token] = h
        return self.head(out.sum(1))


def padded(*lengths):
    x = torch.randn(len(lengths), 4, 3).double()
    for example, length in zip(x, lengths, strict=True):
        example[length:] = -9
    return x, torch.randn(len(lengths), 3).double()


@pytest.mark.parametrize(
    "batches", [[padded(4, 4, 4, 4), padded(4, 2, 3, 3)], [padded(4, 4, 4, 4, 1, 1)]], ids=["later batch", "one batch"]
)
def test_rows_that_change_from_batch_to_batch_are_noticed(batches):
    """The first four examples look as if rows were grouped by example; of one batch, others may be probed."""
    model = Packed().double()
    kron_factors(model, "regression", [(x[:4], y[:4]) for x, y in batches[:1]], backend="asdl")
    with pytest.raises(
        UnsupportedParameterError,
        match=r"'layer.weight' is used by .* (rows that are not grouped by example|no leading axis of the batch's 4)",
    ):
        kron_factors(model, "regression", batches, backend="asdl")


def test_rows_that_change_from_batch_to_batch_are_followed_by_the_native_backend():
    model, batches = Packed().double(), [padded(4, 4, 4, 4), padded(4, 2, 3, 3), padded(1, 1, 4, 4, 2)]
    la = Laplace(model, "regression", hessian_structure="full").fit(batches)
    truth = sum(exact.ggn(model, "regression", x, y) for x, y in batches)
    torch.testing.assert_close(la.H.to_dense(), truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [1, 0, 2, 3], [0, 1, 3, 2], [3, 1, 2, 0]], ids=str)
def test_any_two_of_the_first_four_examples_that_change_places_are_noticed(order):
    class Swapped(nn.Linear):
        def forward(self, x):
            return super().forward(x[order])[torch.tensor(order).argsort()]

    model = nn.Sequential(Swapped(3, 2), nn.Linear(2, 2))
    with pytest.raises(UnsupportedParameterError, match="rows that are not grouped by example"):
        Laplace(model, "regression").check(torch.randn(4, 3))


def test_a_column_that_is_wrong_beside_others_is_noticed():
    class Wrong(NativeBackend):
        @contextmanager
        def linearise(self, *args):
            with super().linearise(*args) as linearisation:
                pullback = linearisation.pullback
                linearisation.pullback = lambda c: [torch.cat([g[:1], 2 * g[1:]]) for g in pullback(c)]
                yield linearisation

    with pytest.raises(UnsupportedParameterError, match="but not by that alone"):
        Laplace(nn.Linear(3, 2), "regression", backend=Wrong()).check(torch.randn(4, 3))


def test_a_column_that_is_wrong_when_it_comes_by_itself_is_noticed():
    class Wrong(NativeBackend):
        @contextmanager
        def linearise(self, *args):
            with super().linearise(*args) as linearisation:
                stream = linearisation.stream
                linearisation.stream = lambda c, receive, **o: stream(c, lambda n, g: receive(n, 2 * g), **o)
                yield linearisation

    with pytest.raises(UnsupportedParameterError, match="but not by that alone"):
        Laplace(nn.Linear(3, 2), "regression", backend=Wrong()).check(torch.randn(4, 3))


def test_no_batch_is_left_out_of_a_model_that_changes_from_call_to_call():
    class Restless(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x.repeat_interleave(self.calls, 0)).unflatten(0, (len(x), -1)).mean(1)

    with pytest.raises(
        UnsupportedParameterError, match="uses its parameters otherwise whenever it is run on one batch"
    ):
        kron_factors(Restless(3, 2), "regression", [(torch.randn(4, 3), torch.randn(4, 2))])


def test_ordinary_batches_are_checked_once(monkeypatch):
    checked = []
    check = checks.check_linearisation
    monkeypatch.setattr(checks, "check_linearisation", lambda b, m, x, p: checked.append(len(x)) or check(b, m, x, p))
    model, x, y = nn.Linear(3, 2), torch.randn(23, 3), torch.randn(23, 2)
    kron_factors(model, "regression", zip(x.split(11), y.split(11), strict=True))
    assert checked == [4, 1]  # the last batch, of one example, is of another kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_hidden_use_is_refused_in_every_precision(dtype):
    model = Net(lambda net, y: y + Hidden.apply(y, net.w)).to(dtype)
    with pytest.raises(UnsupportedParameterError, match="'w' is used by linear, but not by that alone"):
        Laplace(model, "regression").check(torch.randn(6, 3).to(dtype))


@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
def test_a_model_that_changes_its_input_in_place_is_as_good(backend):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x):
            return self.inner(x.mul_(2).tanh_())

    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    model = InPlace().double()
    given = x.clone()
    found = kron_factors(model, "regression", [(given, y)], backend=backend)
    assert torch.equal(given, x)
    truth = kron_factors(nn.Linear(3, 2).double(), "regression", [((2 * x).tanh(), y)])
    torch.testing.assert_close(found["inner.weight"].A, truth["weight"].A)


@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
def test_state_outside_the_model_may_change_between_fits(backend):
    """A trace does not see it; each fit takes a new one."""
    outside = {"factor": 1.0}
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x * outside["factor"])

    la = Laplace(Outer(), "regression", hessian_structure="full", backend=backend)
    data = [(torch.randn(4, 3).double(), torch.randn(4, 2).double())]
    la.fit(data)
    outside["factor"] = 3.0
    la.fit(data)
    torch.testing.assert_close(la.H.to_dense(), exact.ggn(la.model, "regression", *data[0]))


@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
def test_empty_and_foreign_inputs_are_refused_in_one_sentence(backend):
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(InvalidBatchError, match="a batch holds no example"):
        kron_factors(model, "regression", [(x[:0], y[:0])], backend=backend)
    with pytest.raises(InvalidBatchError, match="a batch holds no example"):
        jacobians(model, x[:0], backend=backend)
    for wrong in (None, "x", [], [None]):
        with pytest.raises(InvalidBatchError, match="x must be a tensor of inputs"):
            jacobians(model, wrong, backend=backend)
    for wrong in ([x, y], {"x": x}):
        with pytest.raises(InvalidBatchError, match=rf"Linear is called as model\({type(wrong).__name__}\)"):
            jacobians(model, wrong, backend=backend)
    for output in ((x, x), {"states": x}):
        with pytest.raises(InvalidBatchError, match="the model must return one floating point tensor"):
            Laplace(Returns(output), "regression", backend=backend).check(x)


class Returns(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.layer, self._output = nn.Linear(3, 3), output

    def forward(self, x):
        self.layer(x)
        return self._output
