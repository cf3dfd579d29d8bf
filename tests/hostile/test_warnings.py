"""Data that look like a mistake get one `DataWarning`, and data that only resemble one get none."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from hostile.namespace import Ending
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from laplace_ws import Categorical, DataWarning, Laplace, kron_factors, marglik_training
from laplace_ws.curvature.watch import MOST_HASHED
from laplace_ws.data import datasets, load_dataset
from laplace_ws.data.sources import RawImages, RawSplit

N = 60
x, labels = torch.randn(N, 6), torch.arange(N) % 3
other = torch.randn(N, 6)


def mlp(*end: nn.Module, n_inputs: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_inputs, 4), nn.Tanh(), nn.Linear(4, 3), *end)


def warned(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert {w.filename for w in caught if w.category is DataWarning} <= {__file__}  # they point at the caller
    return [str(w.message) for w in caught if w.category is DataWarning]


def of_fit(data, likelihood="classification", model=None, **options) -> list[str]:
    la = Laplace(model or mlp(n_inputs=data[0][0].shape[-1]), likelihood, **options)
    return warned(lambda: la.fit(data))


def changed(columns: list[int], value: float) -> torch.Tensor:
    copy = x.clone()
    copy[:, columns] = value
    return copy


def halves(*tensors):
    return list(zip(*(t.split(N // 2) for t in tensors), strict=True))


# ------------------------------------------------------------------ what is said


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full", "lowrank"])
@pytest.mark.parametrize(
    ("end", "what"),
    [
        (nn.Softmax(-1), "a softmax"),
        (nn.LogSoftmax(-1), "a log_softmax"),
        (nn.Sigmoid(), "a sigmoid"),
        (nn.Sequential(nn.Softmax(-1), nn.Unflatten(-1, (3, 1)), nn.Flatten()), "a softmax"),
    ],
    ids=["softmax", "log_softmax", "sigmoid", "softmax and views"],
)
def test_a_network_that_ends_in_what_the_likelihood_applies(structure, end, what):
    assert of_fit([(x, labels)], model=mlp(end), hessian_structure=structure) == [
        f"Sequential ends in {what}, but the classification likelihood takes logits and turns them into probabilities itself; leave it "
        "out of the model."
    ]


def of_factors(end, likelihood="classification"):
    targets = labels if likelihood == "classification" else (other[:, :3] > 0).float()
    return warned(lambda: kron_factors(mlp(end), likelihood, [(x, targets)]))


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, f):
        return self.function(f)


@pytest.mark.parametrize(
    ("end", "what"),
    [
        (lambda f: f.softmax(-1), "ends in a softmax"),
        (lambda f: torch.log_softmax(f, -1), "ends in a log_softmax"),
        (torch.sigmoid, "ends in a sigmoid"),
        (F.logsigmoid, "ends in a logsigmoid"),
        (lambda f: f.softmax(-1).clamp(1e-6, 1), "ends in a softmax"),
        (lambda f: f.sigmoid().clamp_min(1e-6), "ends in a sigmoid"),
        (lambda f: f.softmax(-1).log(), "ends in a softmax"),
        (lambda f: f.double().softmax(-1).float(), "ends in a softmax"),
        (lambda f: f.exp() / f.exp().sum(-1, keepdim=True), "gives outputs that sum to one, as after a softmax"),
        (
            lambda f: f - f.logsumexp(-1, keepdim=True),
            "gives logarithms of numbers that sum to one, as after a log_softmax",
        ),
    ],
)
@pytest.mark.parametrize("likelihood", ["classification", "binary"])
def test_what_makes_outputs_into_probabilities_is_seen_in_factors_fits_and_training(end, what, likelihood):
    targets = labels if likelihood == "classification" else (other[:, :3] > 0).float()
    says = [
        f"Sequential {what}, but the {likelihood} likelihood takes logits and turns them into probabilities itself; leave it out of the "
        "model."
    ]
    assert of_factors(Apply(end), likelihood) == says
    assert of_fit([(x, targets)], likelihood, mlp(Apply(end))) == says
    assert of_fit([(x, targets)], likelihood, mlp(Apply(end)), hessian_structure="lowrank") == says
    assert warned(lambda: marglik_training(mlp(Apply(end)), [(x, targets)], likelihood, n_epochs=1)) == says


@pytest.mark.parametrize("end", [nn.Softmax(-1), Apply(lambda f: f.exp() / f.exp().sum(-1, keepdim=True))])
def test_a_regression_on_probabilities_is_one(end):
    assert of_fit([(x, torch.rand(N, 3))], "regression", mlp(end)) == []
    assert warned(lambda: kron_factors(mlp(end), "regression", [(x, torch.rand(N, 3))])) == []


@pytest.mark.parametrize("end", [nn.Identity(), nn.ReLU(), nn.Hardtanh(), nn.LayerNorm(3), Apply(lambda f: 0 * f)])
def test_nothing_is_said_of_logits(end):
    assert of_fit([(x, labels)], model=mlp(end)) == []


def test_one_class_only():
    assert of_fit(halves(x, labels * 0 + 2)) == [
        f"all labels of the {N} examples are 2, so the data know one class only; look at the labels, and at the order in which a subset "
        "was taken."
    ]


@pytest.mark.parametrize("likelihood", ["binary", "regression"])
def test_one_hot_labels_of_another_likelihood(likelihood):
    assert of_fit(halves(x, nn.functional.one_hot(labels, 3).float()), likelihood) == [
        f"each row of targets holds a single 1, as one-hot labels do, but the likelihood is '{likelihood}'; for classes use "
        'likelihood="classification" with y.argmax(-1).'
    ]


@pytest.mark.parametrize(
    ("columns", "which"), [([2], "feature 2 of the inputs is"), ([2, 4], "features 2, 4 of the inputs are")]
)
def test_constant_features(columns, which):
    assert of_fit(halves(changed(columns, 5.0), labels)) == [
        f"{which} the same in all {N} examples and tell nothing apart; look at how the table was made, or leave them out."
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_examples_that_repeat(dtype, structure):
    data = [(x.to(dtype), labels), (x.to(dtype), labels)]
    assert of_fit(data, model=mlp().to(dtype), hessian_structure=structure) == [
        f"{N} of the {2 * N} examples repeat others, as if data were joined to themselves, and count twice in the posterior; take the "
        "copies out."
    ]


@pytest.mark.parametrize("method", ["gridsearch", "gradient"])
def test_validation_data_of_the_fit(method):
    la = Laplace(mlp(), "classification")
    la.fit([(x, labels)])
    val_loader = [(x[:20], labels[:20]), (other[:20], labels[:20])]
    assert warned(lambda: la.optimize_prior_precision(method, val_loader=val_loader, n_steps=3)) == [
        "20 of 40 validation examples are among the data of the fit, which the network predicts better than others; validate on data that "
        "it was not trained on."
    ]


def test_training_says_it_once():
    data = [(x, labels), (x, labels)]
    messages = warned(
        lambda: marglik_training(mlp(nn.Softmax(-1)), data, n_epochs=3, n_epochs_burnin=0, progress_bar=False)
    )
    assert [message.partition(",")[0] for message in messages] == [
        f"{N} of the {2 * N} examples repeat others",
        "Sequential ends in a softmax",
    ]


# ------------------------------------------------------------------ what only resembles it

bootstrap = torch.randint(0, 400, (400,), generator=torch.Generator().manual_seed(1))
many = torch.randn(400, 6)
VARIED = {
    "as usual": lambda: of_fit(halves(x, labels)),
    "a regression of outputs between 0 and 1": lambda: of_fit(halves(x, other[:, :3]), "regression", mlp(nn.Sigmoid())),
    "attention inside": lambda: of_fit(halves(x, labels), model=mlp(nn.Softmax(-1), nn.Linear(3, 3))),
    "an intercept": lambda: of_fit(halves(changed([3], 1.0), labels)),
    "flattened images": lambda: of_fit([(torch.cat([other.repeat(1, 50), torch.zeros(N, 20)], 1), labels)]),
    "images with dark margins": lambda: of_fit(
        [(nn.functional.pad(torch.rand(N, 1, 3, 3), (1, 1, 1, 1)), labels)],
        model=nn.Sequential(nn.Flatten(), nn.Linear(25, 3)),
    ),
    "few examples": lambda: of_fit([(x[:5], labels[:5] * 0)]),
    "a bootstrap sample": lambda: of_fit([(many[bootstrap], labels.repeat(7)[:400])]),
    "binary inputs": lambda: of_fit([((many > 0).float(), labels.repeat(7)[:400])]),
    "small whole numbers": lambda: of_fit([((many > 0).float() + 1, labels.repeat(7)[:400])]),
    "tokens": lambda: of_fit(
        [(torch.arange(N)[:, None] % 3 + torch.arange(4), labels)],
        model=nn.Sequential(nn.Embedding(8, 3), nn.Flatten(), nn.Linear(12, 3)),
    ),
    "a padding label": lambda: of_fit([(x, torch.where(labels == 0, -100, 1))], Categorical(ignore_index=-100)),
    "a few copies": lambda: of_fit([(torch.cat([x, x[:2]]), torch.cat([labels, labels[:2]]))]),
    "many labels of binary targets": lambda: of_fit(halves(x, (other[:, :3] > 0).float()), "binary"),
}


@pytest.mark.parametrize("name", VARIED)
def test_nothing_is_said_of(name):
    assert VARIED[name]() == []


def test_nothing_is_said_of_a_loader_that_draws_with_replacement():
    data = TensorDataset(x, labels)
    loader = DataLoader(data, batch_size=20, sampler=RandomSampler(data, replacement=True, num_samples=5 * N))
    la = Laplace(mlp(), "classification")
    assert warned(lambda: la.fit(loader)) == []


def test_nothing_is_said_of_new_validation_data():
    la = Laplace(mlp(), "classification")
    la.fit([(x, labels)])
    assert warned(lambda: la.optimize_prior_precision("gridsearch", val_loader=[(other, labels)])) == []


def test_only_the_first_examples_are_kept():
    n = 3 * MOST_HASHED
    la = Laplace(nn.Linear(4, 2), "classification", hessian_structure="diag")
    la.fit(DataLoader(TensorDataset(torch.randn(n, 4), torch.arange(n) % 2), batch_size=500))
    assert len(la.fitted.examples) == MOST_HASHED


def test_a_model_that_ends_otherwise_is_looked_at_anew():
    model = Ending(lambda f: f)
    la = Laplace(model, "classification")
    assert warned(lambda: la.fit([(x[:, :3], labels)])) == []
    model.end = nn.Softmax(-1)
    assert len(warned(lambda: la.fit([(x[:, :3], labels)]))) == 1


def images_of(n: int, seed: int) -> RawSplit:
    draws = torch.Generator().manual_seed(seed)
    return RawSplit(torch.randint(256, (n, 1, 9, 9), generator=draws, dtype=torch.uint8), torch.arange(n) % 2)


def test_test_images_among_the_training_images(monkeypatch):
    train = images_of(50, 0)
    other_split = images_of(40, 1)
    copied = RawSplit(torch.cat([train.x[:10], other_split.x[10:]]), other_split.y)
    for name, test in (("copied", copied), ("distinct", other_split)):
        monkeypatch.setitem(
            datasets._SOURCES, name, lambda root, download, test=test: RawImages(train, test, ("a", "b"))
        )
    assert warned(lambda: load_dataset("copied")) == [
        "10 of 40 test images are among the training images, so that scores on them are too good; take them out of one of the two."
    ]
    assert warned(lambda: load_dataset("distinct")) == []
