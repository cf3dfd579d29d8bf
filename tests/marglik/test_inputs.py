"""Training on batches as people have them: inputs of several parts, streams, missing labels, noise of the model's own, few digits."""

from __future__ import annotations

import math
from collections import UserDict

import pytest
import torch
from marglik.runs import QUICK, SGD, Never, blobs, mlp
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from laplace_ws import Categorical, HeteroscedasticGaussian, Laplace
from laplace_ws.data import TensorLoader
from laplace_ws.errors import InvalidBatchError
from laplace_ws.likelihoods import make_likelihood
from laplace_ws.marglik import marglik_training
from laplace_ws.marglik.checkpoint import CheckpointError
from laplace_ws.marglik.checks import check_data
from laplace_ws.marglik.trainer import n_correct


class Wrapped(nn.Module):
    """A network of the tensor that `read` finds in what it is called with."""

    def __init__(self, read):
        super().__init__()
        self.net, self._read = mlp(), read

    def forward(self, *args):
        return self.net(self._read(*args))


class Reshaped:
    """A loader that gives the batches of another in another form; its state is that of the other."""

    def __init__(self, loader, change):
        self.loader, self.change = loader, change
        self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def __iter__(self):
        return (self.change(x, y) for x, y in self.loader)


FORMS = {
    "several inputs": (lambda x, y: (x[:, :2], x[:, 2:], y), lambda a, b: torch.cat([a, b], 1)),
    "tuple": (lambda x, y: ((x[:, :2], x[:, 2:]), y), lambda pair: torch.cat(pair, 1)),
    "mapping": (lambda x, y: ({"a": x, "n": 3}, y), lambda batch: batch["a"]),
    "whole batch": (lambda x, y: UserDict({"input_ids": x, "labels": y}), lambda batch: batch["input_ids"]),
    "own keys": (lambda x, y: {"t": torch.ones(3), "pixels": x, "label": y}, lambda batch: batch["pixels"]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fit_fraction", [1.0, 0.5])
def test_every_form_of_batch_gives_the_same_training(form, fit_fraction):
    change, read = FORMS[form]
    keys = {"dict_key_x": "pixels", "dict_key_y": "label"} if form == "own keys" else {}
    options = QUICK | {"optimizer_kwargs": SGD, "fit_fraction": fit_fraction, "curvature": "ggn"}
    torch.manual_seed(0)
    plain = marglik_training(Wrapped(lambda x: x), blobs(), **options)
    torch.manual_seed(0)
    loader = Reshaped(blobs(), change)
    found = marglik_training(Wrapped(read), loader, **options, **keys)
    assert found.losses == pytest.approx(plain.losses, rel=1e-12)
    assert found.margliks == pytest.approx(plain.margliks, rel=1e-10)
    assert len(set(found.margliks)) == 3
    assert [record["train_accuracy"] for record in found.history] == [r["train_accuracy"] for r in plain.history]
    for _ in range(2):
        torch.testing.assert_close(found.la.H.to_dense(), plain.la.H.to_dense(), rtol=1e-9, atol=1e-12)
        found.la.fit(loader)  # the posterior knows the form of the batches too


# ------------------------------------------------------------------ how many examples there are


class Stream(IterableDataset):
    """Sixty examples, one after the other."""

    def __iter__(self):
        return iter(TensorDataset(*blobs().dataset.tensors))


class StreamWithLength(Stream):
    def __len__(self):
        return 60


@pytest.mark.parametrize(
    ("dataset", "drop_last", "n_data"),
    [(Stream, False, 60), (Stream, True, 48), (StreamWithLength, False, 60), (StreamWithLength, True, 60)],
)
def test_streams_count_what_they_give_or_say_they_have(dataset, drop_last, n_data):
    facts = check_data(mlp(), DataLoader(dataset(), 16, drop_last=drop_last), make_likelihood("classification"))
    assert (facts.n_data, facts.n_batches) == (n_data, 3 if drop_last else 4)


@pytest.mark.parametrize("dataset", [lambda: blobs().dataset, Stream, StreamWithLength])
def test_a_fit_counts_what_it_sees_unless_it_is_told(dataset):
    la, loader = Laplace(mlp(), "classification"), DataLoader(dataset(), 16, drop_last=True)
    la.fit(loader)
    assert la.n_data == 48
    seen = la.H.to_dense(), la.log_likelihood.item()
    la.fit(loader, n_data=60)
    assert la.n_data == 60
    torch.testing.assert_close(la.H.to_dense(), seen[0] * 60 / 48)
    assert la.log_likelihood.item() == pytest.approx(seen[1] * 60 / 48, rel=1e-12)


@pytest.mark.parametrize("n_data", [60, 600])
def test_n_data_may_be_given(n_data):
    """Likelihood and curvature are scaled up to it, and the prior weighs that much less in a step."""
    options = QUICK | {
        "optimizer_kwargs": SGD,
        "curvature": "ggn",
        "n_hypersteps": 0,
        "n_epochs": 1,
        "n_epochs_burnin": 0,
    }
    torch.manual_seed(0)
    model = mlp()
    result = marglik_training(model, DataLoader(Stream(), 16), n_data=n_data, prior_prec_init=1.0, **options)
    x, y = blobs().dataset.tensors
    nll = nn.functional.cross_entropy(model(x), y, reduction="sum").item()
    assert result.la.n_data == n_data
    assert result.la.log_likelihood.item() == pytest.approx(-nll * n_data / 60, rel=1e-9)
    default = marglik_training(mlp(), DataLoader(Stream(), 16), n_data=n_data, **options)
    assert default.prior_precision["0.weight"] == pytest.approx(0.01 * n_data)


def test_the_prior_of_a_step_is_that_of_n_data():
    """Without a likelihood to speak of, a step shrinks the weights by lr·δ/N."""

    def shrinkage(n_data):
        model, x = nn.Linear(2, 2, bias=False), torch.zeros(8, 2)
        before = model.weight.detach().clone()
        marglik_training(model, [(x, torch.zeros(8).long())], n_data=n_data, prior_prec_init=2.0, n_hypersteps=0, n_epochs=1,
                         optimizer_kwargs={"lr": 0.1}, scheduler_cls=torch.optim.lr_scheduler.ConstantLR,
                         scheduler_kwargs={"factor": 1.0}, progress_bar=False)  # fmt: skip
        return (1 - model.weight.detach() / before).mean().item()

    assert shrinkage(None) == pytest.approx(0.1 * 2 / 8, rel=1e-4)
    assert shrinkage(80) == pytest.approx(0.1 * 2 / 80, rel=1e-4)


@pytest.mark.parametrize("n_data", [0, -1])
def test_n_data_must_be_positive(n_data):
    with pytest.raises(ValueError, match=f"n_data={n_data} must be at least 1"):
        marglik_training(mlp(), blobs(), n_data=n_data, optimizer_cls=Never, optimizer_kwargs=SGD, **QUICK)


def test_a_run_with_another_n_data_is_another_run(tmp_path):
    options = QUICK | {"optimizer_kwargs": SGD, "checkpoint_path": tmp_path / "run.pt"}
    marglik_training(mlp(), blobs(), **options)
    with pytest.raises(CheckpointError, match="n_data was 60 and is 61"):
        marglik_training(mlp(), blobs(), resume=True, n_data=61, **options)


# ------------------------------------------------------------------ what counts of a batch


def token_loader(y):
    x = torch.randn(len(y), 4, 4, generator=torch.Generator().manual_seed(0)).double()
    return TensorLoader(x, y, batch_size=4)


def token_labels():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (12, 4), generator=generator)
    y[torch.rand(12, 4, generator=generator) < 0.3] = -100
    y[4:9] = -100  # a batch without any label, and an example
    return y


def test_missing_labels_are_left_out_of_training_and_accuracy():
    """The logits of a sequence come from its own tokens alone, so a label more or less changes the loss by its own term."""
    y = token_labels()
    model, seen = mlp(), []

    def watch(record):
        seen.append(record["train_accuracy"])

    options = QUICK | {"optimizer_kwargs": {"lr": 1e-12}, "curvature": "ggn", "prior_prec_init": 1e-3, "n_epochs": 2}
    options |= {"n_hypersteps": 1, "lr_hyp": 1e-9, "n_epochs_burnin": 0}
    result = marglik_training(model, token_loader(y), Categorical(ignore_index=-100), on_epoch=watch, **options)
    f, counts = model(token_loader(y).dataset.tensors[0]), y != -100
    nll = nn.functional.cross_entropy(f[counts], y[counts], reduction="sum").item()
    assert result.la.log_likelihood.item() == pytest.approx(-nll, rel=1e-6)
    assert result.history[0]["train_nll"] == pytest.approx(nll / 12, rel=1e-6)
    right = ((f.argmax(-1) == y) & counts).double().sum(1) / counts.sum(1)
    assert seen[0] == pytest.approx(right.nanmean().item(), rel=1e-12)  # an example without labels is 0 of 0
    assert result.la.n_data == 12


def test_a_step_is_on_the_summed_loss_over_the_number_of_examples():
    y, model = token_labels()[:4], mlp()
    counts, start = y != -100, [p.detach().clone() for p in model.parameters()]
    loader = token_loader(y)
    nn.functional.cross_entropy(model(loader.dataset.tensors[0])[counts], y[counts], reduction="sum").backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    options = {"scheduler_cls": torch.optim.lr_scheduler.ConstantLR, "scheduler_kwargs": {"factor": 1.0}}
    options |= {"n_epochs": 1, "n_hypersteps": 0, "prior_prec_init": 1e-9, "optimizer_kwargs": {"lr": 0.01}}
    marglik_training(model, loader, Categorical(ignore_index=-100), progress_bar=False, **options)
    for p, before, gradient in zip(model.parameters(), start, gradients, strict=True):
        torch.testing.assert_close(p.detach(), before - 0.01 * gradient / 4, rtol=1e-9, atol=1e-12)


def test_a_label_that_is_usually_ignored_is_refused_before_training():
    with pytest.raises(InvalidBatchError, match=r"use Categorical\(ignore_index=-100\)"):
        marglik_training(mlp(), token_loader(token_labels()), optimizer_cls=Never, optimizer_kwargs=SGD, **QUICK)


def test_accuracy_counts_terms_that_count():
    f, y = torch.eye(2).expand(3, 2, 2), torch.tensor([[0, 0], [0, 9], [9, 9]])
    assert n_correct(f, y, (y != 9)[..., None]).item() == 1.5


def test_the_noise_that_a_model_gives_itself_is_learned():
    """Noise of standard deviation 0.1 on the left and 0.5 on the right."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 1, generator=generator, dtype=torch.float64) * 4 - 2
    sigma = torch.where(x < 0, 0.1, 0.5)
    y = torch.sin(2 * x) + sigma * torch.randn(400, 1, generator=generator, dtype=torch.float64)
    model = mlp(1, 2, 20)
    result = marglik_training(
        model,
        TensorLoader(x, y, batch_size=100, shuffle=True),
        "heteroscedastic_regression",
        optimizer_cls=torch.optim.Adam,
        optimizer_kwargs={"lr": 0.02},
        n_epochs=150,
        n_epochs_burnin=30,
        marglik_frequency=30,
        n_hypersteps=20,
        prior_prec_init=1.0,
        progress_bar=False,
    )
    assert isinstance(result.la.likelihood, HeteroscedasticGaussian)
    found = (0.5 * model(torch.tensor([[-1.0], [1.0]], dtype=torch.float64))[:, 1]).exp()
    assert found.tolist() == pytest.approx([0.1, 0.5], rel=0.35)
    assert result.margliks[-1] > result.margliks[0]
    assert {record["train_accuracy"] for record in result.history} == {None}
    assert {record["sigma_noise"] for record in result.history} == {None}


# ------------------------------------------------------------------ few digits


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_trained_and_tuned(dtype, structure):
    x, y = blobs().dataset.tensors
    losses, margliks = [], []
    for to in (dtype, torch.float32):
        torch.manual_seed(0)
        loader = TensorLoader(x.to(to), y, batch_size=16)
        model = mlp().to(dtype).to(to)
        result = marglik_training(
            model, loader, hessian_structure=structure, curvature="ggn", optimizer_kwargs=SGD, **QUICK
        )
        losses.append(result.losses)
        margliks.append(result.margliks)
        assert {p.dtype for p in model.parameters()} == {to}
        assert all(math.isfinite(value) for value in (*result.losses, *result.margliks))
    # every step rounds the weights to 2⁻⁸ of themselves, and 24 steps of momentum add up: no more than some 2⁻⁴ of the loss
    assert losses[0] == pytest.approx(losses[1], rel=2**-4)
    assert margliks[0] == pytest.approx(margliks[1], rel=2**-4)


def test_losses_of_half_precision_outputs_are_summed_in_single_precision():
    """With steps below the rounding of the weights, the loss is that of the outputs as they are; in bfloat16 it would keep 8 bits."""
    x, y = blobs().dataset.tensors
    model = mlp().bfloat16()
    loader = TensorLoader(x.bfloat16(), y, batch_size=60)
    options = QUICK | {"n_epochs": 1, "n_epochs_burnin": 0, "n_hypersteps": 0, "optimizer_kwargs": {"lr": 1e-9}}
    result = marglik_training(model, loader, **options)
    truth = nn.functional.cross_entropy(model(x.bfloat16()).double(), y).item()
    assert result.history[0]["train_nll"] == pytest.approx(truth, rel=1e-6)


def test_inputs_of_another_type_are_refused_before_training():
    x, y = blobs().dataset.tensors
    with pytest.raises(InvalidBatchError, match=r"inputs are torch.float32 and the model's parameters torch.float64"):
        marglik_training(mlp(), [(x.float(), y)], optimizer_cls=Never, optimizer_kwargs=SGD, **QUICK)
