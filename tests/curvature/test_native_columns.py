"""How the native backend pulls columns back: one by one as they come, or many in one vectorised pass; always the same numbers."""

import gc
import weakref

import pytest
import torch
from cases import CASES
from torch import nn

from laplace_ws.curvature import backend as backend_module
from laplace_ws.curvature.backend import evaluation_mode, trainable_parameters
from laplace_ws.curvature.native import NativeBackend, NativeLinearisation


def linearised(model, x):
    return NativeBackend().linearise(model, x, trainable_parameters(model))


def columns_for(linearisation, n=3):
    f = linearisation.outputs
    return torch.randn(n, *f.shape, dtype=f.dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_streamed_and_vectorised_columns_are_those_pulled_one_by_one(case):
    model, x, _ = case.make()
    with evaluation_mode(model), linearised(model, x) as linearisation:
        columns = columns_for(linearisation)
        assert linearisation.uses
        truth = [torch.cat(g) for g in zip(*(linearisation.pullback(c[None]) for c in columns), strict=True)]
        together = linearisation.pullback(columns)
        streamed = {}
        for k, column in enumerate(columns):
            linearisation.stream(
                column[None], lambda n, g: streamed.setdefault(n, []).append(g), is_last=k == len(columns) - 1
            )
        assert sorted(streamed) == list(range(len(truth)))
        for number, expected in enumerate(truth):
            torch.testing.assert_close(together[number], expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(torch.cat(streamed[number]), expected, rtol=1e-10, atol=1e-12)


class Double(torch.autograd.Function):
    """Has no rule for a vectorised backward pass."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g if float(g.sum()) == float(g.sum()) else g  # reads a value


class WithDouble(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(Double.apply(self.first(x)))


def test_what_torch_cannot_vectorise_is_pulled_one_by_one():
    model, x = WithDouble(), torch.randn(5, 3)
    with linearised(model, x) as linearisation:
        columns = columns_for(linearisation)
        assert linearisation.columns_at_once > 1
        together = linearisation.pullback(columns)
        assert linearisation.columns_at_once == 1
        for number, g in enumerate(together):
            torch.testing.assert_close(g[1], linearisation.pullback(columns[1:2])[number][0])


def test_columns_are_halved_where_memory_runs_out(monkeypatch):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(5, 3)
    pull, sizes = NativeLinearisation._pull, []

    def pull_little(self, columns, **options):
        sizes.append(len(columns) if options else 1)
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no more")
        return pull(self, columns, **options)

    with linearised(model, x) as linearisation:
        columns = columns_for(linearisation, 9)
        truth = linearisation.pullback(columns)
        monkeypatch.setattr(NativeLinearisation, "_pull", pull_little)
        found = linearisation.pullback(columns)
        assert sizes[:3] == [9, 4, 2]
        assert linearisation.columns_at_once == 2
        for g, expected in zip(found, truth, strict=True):
            torch.testing.assert_close(g, expected)


def test_columns_at_once_fit_the_memory(monkeypatch):
    model, x = nn.Linear(3, 4), torch.randn(5, 3)  # a column of 5 × 4 numbers of 4 bytes at each of weight and bias
    for n_bytes, expected in ((1, 1), (80, 1), (800, 10)):
        monkeypatch.setattr(backend_module, "COLUMN_BYTES", n_bytes)
        with linearised(model, x) as linearisation:
            assert linearisation.columns_at_once == expected


def test_inputs_are_let_go_once_the_uses_are_forgotten():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(5, 3)
    with linearised(model, x) as linearisation:
        inputs = [weakref.ref(use.x) for use in linearisation.uses]
        linearisation.forget_uses()
        gc.collect()
        assert all(ref() is None for ref in inputs)
        received = []
        linearisation.stream(columns_for(linearisation, 1), lambda n, g: received.append(n), is_last=True)
        assert sorted(received) == [0, 1]


@pytest.mark.not_simulated(
    "an error in a hook ends the process there: torch runs backward passes of that device in a thread of their own"
)
def test_no_hook_is_left_on_the_graph_when_a_receiver_fails():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(5, 3)

    def fail(number, g):
        raise ValueError("full")

    with linearised(model, x) as linearisation:
        columns = columns_for(linearisation, 1)
        with pytest.raises(ValueError, match="full"):
            linearisation.stream(columns, fail)
        received = []
        linearisation.stream(columns, lambda n, g: received.append(n))
        assert sorted(received) == [0, 1]
