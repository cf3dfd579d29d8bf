"""What a training's own passes show: which of them are recorded, and that the model is left as it was."""

import gc

import pytest
import torch
from cases import double
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from laplace_ws import UnsupportedParameterError
from laplace_ws.curvature.capture import TrainingCapture
from laplace_ws.kfac import DiagAccumulator


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.fails, self.overwrites = None, False

    def forward(self, x):
        h = self.first(x)
        if self.fails is not None:
            raise self.fails
        y = self.head(h)
        if self.overwrites:
            h.mul_(2)
        return y


def capture_of(model, **options):
    parameters = dict(model.named_parameters())
    capture = TrainingCapture(model, parameters, lambda recorder, form: DiagAccumulator(parameters), **options)
    capture.is_on = True
    return capture


@pytest.fixture
def model():
    return double(Net())


@pytest.fixture
def x():
    return torch.randn(5, 3).double()


def diagonal(batch):
    return batch.accumulator.result().to_dense().diagonal()


def per_example_squares(model, x):
    rows = []
    for one in x:
        gradients = torch.autograd.grad(model(one[None]).square().sum(), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]).square())
    return torch.stack(rows).sum(0)


def test_gradients_of_each_example_come_from_the_pass_of_training(model, x):
    truth = per_example_squares(model, x)
    capture = capture_of(model)
    model(x).square().sum().backward()
    (batch,) = capture.take()
    torch.testing.assert_close(diagonal(batch), truth, rtol=1e-12, atol=0)
    assert (batch.n_examples, capture.form.output_shape, capture.form.n_arguments) == (5, (2,), 1)
    assert capture.take() == []


def test_what_is_not_recorded(model, x):
    capture = capture_of(model)
    with torch.no_grad():
        model(x)
    model.eval()
    model(x).sum().backward()
    model.train()
    capture.is_on = False
    model(x).sum().backward()
    capture.is_on = True
    assert capture.take() == []
    assert capture.form is None


def test_a_pass_that_is_not_differentiated_is_forgotten_with_its_graph(model, x):
    made = []
    parameters = dict(model.named_parameters())

    class Counted(DiagAccumulator):
        def __init__(self):
            super().__init__(parameters)
            made.append(1)

        def __del__(self):
            made.pop()

    capture = TrainingCapture(model, parameters, lambda recorder, form: Counted())
    capture.is_on = True
    for _ in range(3):
        model(x)
    gc.collect()
    assert made == []
    f = model(x)
    assert made == [1]
    f.sum().backward()
    assert len(capture.take()) == 1


def test_two_passes_are_two_batches(model, x):
    capture = capture_of(model)
    (model(x).sum() + model(x[:2]).sum()).backward()
    assert sorted(batch.n_examples for batch in capture.take()) == [2, 5]


def test_a_pass_is_differentiated_once(model, x):
    capture = capture_of(model)
    loss = model(x).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one forward pass was differentiated twice"):
        loss.backward()
    capture.drop()
    model(x).sum().backward()
    assert len(capture.take()) == 1


def test_a_use_that_the_loss_does_not_reach_has_gradient_zero(model, x):
    capture = capture_of(model)
    model.first(x)  # not the model's own pass
    hidden = []
    model.first.register_forward_hook(lambda *all: hidden.append(all[2]))
    model(x)
    hidden[-1].sum().backward()
    (batch,) = capture.take()
    of_head = diagonal(batch)[-10:]
    assert of_head.count_nonzero() == 0
    assert diagonal(batch).count_nonzero() == 16


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_pass_that_fails_leaves_nothing_behind(model, x, error):
    capture = capture_of(model)
    model.fails = error
    with pytest.raises(type(error)):
        model(x)
    model.fails = None
    if isinstance(error, ValueError):
        assert _get_current_function_mode_stack() == []
    model(x).square().sum().backward()  # after an interrupt, for which torch runs no hooks, the next pass tidies up
    assert _get_current_function_mode_stack() == []
    (batch,) = capture.take()
    capture.remove()
    torch.testing.assert_close(diagonal(batch), per_example_squares(model, x))


def test_an_interrupted_capture_can_be_removed(model, x):
    capture = capture_of(model)
    model.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(x)
    capture.remove()
    assert _get_current_function_mode_stack() == []
    assert not model._forward_hooks


def test_inputs_that_are_overwritten_are_refused(model, x):
    capture = capture_of(model)
    model.overwrites = True
    with pytest.raises(UnsupportedParameterError, match="an input of linear was changed in place"):
        model(x)
    assert _get_current_function_mode_stack() == []
    assert capture.take() == []


def test_inputs_that_do_not_tell_the_examples():
    class OfNumbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, n, *, scale=1.0):
            return self.layer(torch.ones(n, 3).double() * scale)

    model = OfNumbers().double()
    capture = capture_of(model)
    model(4, scale=2.0).sum().backward()
    (batch,) = capture.take()
    assert batch.n_examples == 4
    model(n=6).sum().backward()
    (batch,) = capture.take()
    assert batch.n_examples == 6


def test_checkpointing(model, x):
    class Checkpointed(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net.head(checkpoint(self.net.first, x, use_reentrant=False))

    truth = per_example_squares(model, x)
    outer = Checkpointed(model)
    capture = capture_of(outer)
    outer(x).square().sum().backward()
    (batch,) = capture.take()
    torch.testing.assert_close(diagonal(batch), truth)
